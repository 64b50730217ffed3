#!/usr/bin/env bash
#SBATCH --job-name=mf_predict
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=%x-%j.log
# Segment images, folders, lists of urls, tars or a packed source on all ranks of the allocation, or of every task of an
# array; the results do not depend on how many they are. DIR lies on a file system that all of them see.
#   sbatch [--nodes=N --gpus-per-node=G --ntasks-per-node=G ...] launch/predict.sh INPUT ... --run RUN --out DIR [option ...]
#   sbatch --array=0-15 [--gpus-per-node=1 ...] launch/predict.sh INPUT ... --run RUN --out DIR [option ...]
# A job that was preempted, ran out of time or met a fault of the surroundings comes back and goes on behind the last
# part that is committed. The rank that ends last writes what belongs to all parts and has the exit code of all of it.
# To run some tasks of an array again, say of how many shares they are: SHARES=16 sbatch --array=3,7 launch/predict.sh ...
set -u
root=${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/launch/start.sh" ]; then
  echo "predict.sh: $root is not the project's folder: submit from there or set MF_ROOT" >&2
  exit 2
fi
. "$root/launch/start.sh"
if [ $# -lt 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "usage: sbatch [options] launch/predict.sh INPUT ... --run RUN --out DIR [option ...]" >&2
  echo "without SLURM: mf-scale predict INPUT ... --run RUN --out DIR --processes N" >&2
  exit 2
fi
mf_project "$root"

id=${SLURM_ARRAY_TASK_ID:-0} first=${SLURM_ARRAY_TASK_MIN:-0} last=${SLURM_ARRAY_TASK_MAX:-0}
count=${SLURM_ARRAY_TASK_COUNT:-1}
if [ -n "${SHARES:-}" ]; then
  first=0 count=$SHARES
elif [ $((last - first + 1)) -ne "$count" ]; then
  echo "predict.sh: the tasks of this array leave numbers out: set SHARES to their whole number, or use --array=0-N" >&2
  exit 2
fi

mf_facts && places=$(mf_python mf_scale.cluster places)
mf_exit=$?
if [ "$mf_exit" -ne 0 ]; then
  mf_again
  exit "$mf_exit"
fi
eval "${places#*'# the plan'}"
mf_ranks predict "$@" --share "$((id - first))/$count"
answer=''
mf_facts && answer=$(mf_python mf_scale.cluster again --code "$mf_exit" --signals "$mf_signals" --resumes)
[ "$answer" = requeue ] && mf_requeue
exit "$mf_exit"
