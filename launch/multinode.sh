#!/usr/bin/env bash
#SBATCH --job-name=mf_scale
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
# Train on one or many nodes, with or without GPUs, one task a rank; comes back by itself after a preemption, the time
# limit, a lost node, a killed rank (docs/cluster.md). Options of sbatch override the lines above.
#   sbatch [--nodes=N --gpus-per-node=G --ntasks-per-node=G ...] launch/multinode.sh CONFIG [key=value ...]
# Exit codes: 0 done; 2 a user's mistake and 3 a guard are never requeued; 85 (stopped on request, state committed) and
# all others are, until launch.fruitless_starts of them in a row brought the run no further.
set -u
root=${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/launch/start.sh" ]; then
  echo "multinode.sh: $root is not the project's folder: submit from there or set MF_ROOT" >&2
  exit 2
fi
. "$root/launch/start.sh"
mf_main launch/multinode.sh "$@"
