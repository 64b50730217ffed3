#!/usr/bin/env bash
#SBATCH --job-name=mf_scale
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
# Train on one node, a rank a GPU: launch/multinode.sh with the defaults of a single node. Without --ntasks-per-node the
# node is taken whole (--exclusive), and as many ranks are started as the job has GPUs.
#   sbatch [--gpus-per-node=G ...] launch/singlenode.sh CONFIG [key=value ...]
set -u
root=${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/launch/start.sh" ]; then
  echo "singlenode.sh: $root is not the project's folder: submit from there or set MF_ROOT" >&2
  exit 2
fi
. "$root/launch/start.sh"
mf_main launch/singlenode.sh "$@"
