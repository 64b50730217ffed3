#!/usr/bin/env bash
#SBATCH --job-name=mf_pack
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=%x-%A_%a.log
# Pack a dataset in parts, one a task of a SLURM array, on a file system that all of them see.
#   sbatch --array=0-15 [--cpus-per-task N ...] launch/pack.sh FORMAT SRC DST --split SPLIT [option ...]
# The part that ends last writes the index. A task that was preempted or ran out of time comes back and goes on where
# it stopped; one that was cancelled does not. To run some tasks again, say of how many parts they are:
#   PARTS=16 sbatch --array=3,7 launch/pack.sh ...
set -u
if [ $# -lt 3 ]; then
  echo "usage: sbatch --array=0-N launch/pack.sh FORMAT SRC DST --split SPLIT [option ...]" >&2
  exit 2
fi
root=${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/launch/start.sh" ]; then
  echo "pack.sh: $root is not the project's folder: submit from there or set MF_ROOT" >&2
  exit 2
fi
. "$root/launch/start.sh"
mf_project "$root"

id=${SLURM_ARRAY_TASK_ID:-0} first=${SLURM_ARRAY_TASK_MIN:-0} last=${SLURM_ARRAY_TASK_MAX:-0}
count=${SLURM_ARRAY_TASK_COUNT:-1}
if [ -n "${PARTS:-}" ]; then
  first=0 count=$PARTS
elif [ $((last - first + 1)) -ne "$count" ]; then
  echo "pack.sh: the tasks of this array leave numbers out: set PARTS to the number of parts, or use --array=0-N" >&2
  exit 2
fi

# Packing runs in the job script's own node, so both signals are for it to hear.
trap 'mf_signals="$mf_signals USR1"; [ -n "$mf_pid" ] && kill -TERM "$mf_pid" 2>/dev/null' USR1
trap 'mf_signals="$mf_signals TERM"; [ -n "$mf_pid" ] && kill -TERM "$mf_pid" 2>/dev/null' TERM
# In the background, since a trap waits for the foreground command to end.
${mf_head[@]+"${mf_head[@]}"} "$python" -m data_tools pack "$@" --part "$((id - first))/$count" \
  --workers "${SLURM_CPUS_PER_TASK:-$(nproc)}" &
mf_pid=$!
mf_wait "$mf_pid"

if [ "$mf_exit" -ne 0 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  answer=''
  mf_facts && answer=$(mf_python mf_scale.cluster again --code "$mf_exit" --signals "$mf_signals" --resumes)
  [ "$answer" = requeue ] && mf_requeue
fi
exit "$mf_exit"
