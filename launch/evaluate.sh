#!/usr/bin/env bash
#SBATCH --job-name=mf_evaluate
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# mIoU, PQ and mask AP of a run or checkpoint, on all ranks of the allocation; their number does not change the results.
#   sbatch [--nodes=N --gpus-per-node=G --ntasks-per-node=G ...] launch/evaluate.sh RUN|CHECKPOINT [key=value ...] [--split train]
# The exit code is that of `mf-scale evaluate`. It has no state: after a preemption or a fault of the surroundings (75) it
# begins anew; out of time it is given up.
set -u
root=${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/launch/start.sh" ]; then
  echo "evaluate.sh: $root is not the project's folder: submit from there or set MF_ROOT" >&2
  exit 2
fi
. "$root/launch/start.sh"
if [ $# -lt 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "usage: sbatch [options] launch/evaluate.sh RUN|CHECKPOINT [key=value ...] [--split val|train]" >&2
  echo "without SLURM: mf-scale evaluate RUN" >&2
  exit 2
fi
mf_project "$root"
mf_facts && places=$(mf_python mf_scale.cluster places)
mf_exit=$?
if [ "$mf_exit" -ne 0 ]; then
  mf_again
  exit "$mf_exit"
fi
eval "${places#*'# the plan'}"
mf_ranks evaluate "$@"
answer=''
mf_facts && answer=$(mf_python mf_scale.cluster again --code "$mf_exit" --signals "$mf_signals")
[ "$answer" = requeue ] && mf_requeue
exit "$mf_exit"
