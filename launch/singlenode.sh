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
# A task of an array has two names; the plain number of its last one is the whole array's.
mf_job=${SLURM_JOB_ID:-none}
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || mf_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# A start that was requeued takes everything from the copy that was made of what was submitted: its comment names it.
frozen=$(scontrol show job "$mf_job" 2>/dev/null | sed -n 's/^ *Comment=.*mf_scale: *//p' | sed 's/ *$//')
root=${frozen:-${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}}
if [ ! -f "$root/launch/job.sh" ]; then
  echo "singlenode.sh: $root is not the project's folder: submit from there or set MF_ROOT" >&2
  exit 2
fi
. "$root/launch/job.sh"
mf_main launch/singlenode.sh "$frozen" "$@"
