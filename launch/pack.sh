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
# it stopped. To run some tasks again, say of how many parts they are: PARTS=16 sbatch --array=3,7 launch/pack.sh ...
set -u
if [ $# -lt 3 ]; then
  echo "usage: sbatch --array=0-N launch/pack.sh FORMAT SRC DST --split SPLIT [option ...]" >&2
  exit 2
fi
root=${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
python=${MF_PYTHON:-$root/.venv/bin/python}
if [ ! -x "$python" ]; then
  echo "pack.sh: there is no python at $python: run 'make setup', submit from the project's folder, or set MF_PYTHON" >&2
  exit 2
fi

id=${SLURM_ARRAY_TASK_ID:-0} first=${SLURM_ARRAY_TASK_MIN:-0} last=${SLURM_ARRAY_TASK_MAX:-0}
count=${SLURM_ARRAY_TASK_COUNT:-1}
if [ -n "${PARTS:-}" ]; then
  first=0 count=$PARTS
elif [ $((last - first + 1)) -ne "$count" ]; then
  echo "pack.sh: the tasks of this array leave numbers out: set PARTS to the number of parts, or use --array=0-N" >&2
  exit 2
fi

cd "$root" || exit 2
# In the background, since a trap waits for the foreground command to end.
"$python" -m data_tools pack "$@" --part "$((id - first))/$count" --workers "${SLURM_CPUS_PER_TASK:-$(nproc)}" &
packing=$!
stopped=0
trap 'stopped=1; kill -TERM "$packing" 2>/dev/null' USR1 TERM
wait "$packing"
# A trapped signal ends `wait` early; the last `wait` gives the true exit code.
while kill -0 "$packing" 2>/dev/null; do wait "$packing"; done
wait "$packing"
code=$?

again=$stopped  # out of time
[ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] && again=1  # a process was killed, or storage failed
if [ "$again" -eq 1 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  echo "pack.sh: exit code $code: requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" || echo "pack.sh: requeueing is not allowed here: submit the same command again" >&2
fi
exit "$code"
