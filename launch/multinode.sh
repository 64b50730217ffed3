#!/usr/bin/env bash
#SBATCH --job-name=mf_scale
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
# Train on one or many nodes; comes back by itself after a preemption or the time limit.
#   sbatch [--nodes N --gpus-per-node G --ntasks-per-node G ...] launch/multinode.sh CONFIG [key=value ...]
# Exit codes: 0 done; 2 a user's mistake and 3 a guard are never requeued; 75 (storage or network failed) and 85
# (stopped on request, state committed) are.
set -u
if [ $# -lt 1 ]; then
  echo "usage: sbatch [options] launch/multinode.sh CONFIG [key=value ...]" >&2
  exit 2
fi
root=${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/launch/env.sh" ]; then
  echo "multinode.sh: $root is not the project's folder: submit from there or set MF_ROOT" >&2
  exit 2
fi
. "$root/launch/env.sh"
python=${MF_PYTHON:-$root/.venv/bin/python}
if [ ! -x "$python" ]; then
  echo "multinode.sh: there is no python at $python: run 'make setup' or set MF_PYTHON" >&2
  exit 2
fi

# The head node may be another one after every requeue, and a port may still be held by the last start.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR MASTER_PORT
# Tasks of a node share its cores; without this every task takes them all.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# srun goes to the background, since a trap waits for the foreground command to end.
srun --kill-on-bad-exit=1 "$python" -m mf_scale.cli train "$@" &
step=$!
trap 'kill -USR1 "$step" 2>/dev/null' USR1
wait "$step"
# A trapped signal ends `wait` early; the last `wait` gives the true exit code.
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?

again=0
[ "$code" -eq 85 ] && again=1  # stopped on request, state committed
[ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] && again=1  # storage or network failed
if [ "$again" -eq 1 ]; then
  echo "multinode.sh: exit code $code: requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" || echo "multinode.sh: requeueing is not allowed here: submit the same command again" >&2
fi
exit "$code"
