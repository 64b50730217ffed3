# Sourced by the job scripts: what they have in common. Nothing here is written to but the run directory.
#   mf_main CONFIG [key=value ...]   in a job: check, train, requeue; outside of one: keep a copy and submit
#   mf_wait PID                      wait through signals; the exit code in mf_exit
#   mf_facts                         what SLURM says of this job, for the Python halves (mf_scale/cluster)
#   mf_requeue                       ask SLURM to start this job again
# Settings (environment): MF_ROOT the project's folder (default: where sbatch was called), MF_PYTHON its Python
# (default: MF_ROOT/.venv/bin/python), MF_CONTAINER and MF_CONTAINER_MOUNTS (launch/container.sh).

mf_launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 2
mf_signals='' mf_pid='' mf_exit=0
# A task of an array has two names; the plain number of its last one is the whole array's.
mf_job=${SLURM_JOB_ID:-}
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || mf_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# First of all: an untrapped USR1 kills the batch shell. Of the two only USR1 is passed on: SLURM has sent TERM to the
# ranks itself, and a TERM to srun costs their last lines.
trap 'mf_signals="$mf_signals USR1"; [ -n "$mf_pid" ] && kill -USR1 "$mf_pid" 2>/dev/null' USR1
trap 'mf_signals="$mf_signals TERM"' TERM

mf_say() { echo "mf_scale: $*" >&2; }

# Where the project is, which Python runs it, and in what container. $1: the folder that mf_scale is imported from.
mf_project() {
  mf_root=${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
  . "$mf_launch/env.sh"
  python=${MF_PYTHON:-$mf_root/.venv/bin/python}
  . "$mf_launch/container.sh"
  mf_container || exit 2
  if [ -z "${MF_CONTAINER:-}" ] && ! command -v "$python" >/dev/null; then
    mf_say "there is no python at $python: run 'make setup', submit from the project's folder, or set MF_ROOT or MF_PYTHON"
    exit 2
  fi
  mf_pythonpath=${PYTHONPATH:-}
  mf_import_from "$1"
}

# The code of $1 goes before everything; the folder of the submission behind it, where a model builder may lie. Without
# SAFEPATH `python -m` would put that folder first.
mf_import_from() {
  export PYTHONSAFEPATH=1
  export PYTHONPATH="$1${mf_pythonpath:+:$mf_pythonpath}:$PWD"
}

# A Python half, on this node.
mf_python() { ${mf_head[@]+"${mf_head[@]}"} "$python" -m "$@"; }

mf_facts() {
  local try
  for try in 1 2 3; do
    MF_JOB_FACTS=$(timeout 30 scontrol show job "$mf_job") && break
    [ "$try" = 3 ] || sleep 5
  done
  MF_JOB_NODES=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}")
  if [ -z "$MF_JOB_FACTS" ] || [ -z "$MF_JOB_NODES" ]; then
    mf_say "scontrol does not tell of job $mf_job: SLURM's commands must be in PATH on the nodes (launch/site.env)"
    return 75
  fi
  export MF_JOB_FACTS MF_JOB_NODES
}

# A trapped signal ends `wait` early; the last `wait` gives the true exit code.
mf_wait() {
  wait "$1"
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
  wait "$1"
  mf_exit=$?
}

mf_requeue() {
  timeout 60 scontrol requeue "$mf_job" ||
    mf_say "SLURM does not requeue the job: submit the same command again, or chain jobs by --dependency=singleton"
}

# One look at every node: can it start Python, does it see the run directory, is its clock right, is its code the same.
mf_probe() {
  local began answers
  began=$(date +%s.%N)
  answers=$(timeout -k 5 60 srun --nodes="$mf_nodes" --ntasks="$mf_nodes" --ntasks-per-node=1 \
    ${mf_srun[@]+"${mf_srun[@]}"} /bin/sh -c '
      token=$1; shift
      "$@" -m mf_scale.cluster probe "$token"
      code=$?
      case $code in
        0) ;;
        126 | 127) echo "{\"node\": \"$SLURMD_NODENAME\", \"missing\": true}" ;;
        *) echo "{\"node\": \"$SLURMD_NODENAME\", \"failed\": $code}" ;;
      esac' probe "$mf_token" ${mf_inside[@]+"${mf_inside[@]}"} "$python")
  mf_python mf_scale.cluster judge --run "$mf_run" --nodes "$mf_nodes" --began "$began" <<<"$answers"
}

# The ranks: one task each, Python itself the task. --cpus-per-task is not inherited from sbatch since SLURM 22.05.
mf_ranks() {
  local cpus=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / mf_per_node))}
  [ "$cpus" -gt 0 ] || cpus=1
  # Ranks of a node share its cores; without this each takes them all.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}"
  # In the background, since a trap waits for the foreground command to end.
  srun --nodes="$mf_nodes" --ntasks="$mf_ranks" --ntasks-per-node="$mf_per_node" --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 ${mf_srun[@]+"${mf_srun[@]}"} ${mf_inside[@]+"${mf_inside[@]}"} \
    "$python" -m mf_scale.cli "$@" &
  mf_pid=$!
  mf_wait "$mf_pid"
  mf_pid=''
}

# Check, train, and bring the job back where that makes sense. $1: the frozen copy of an earlier start, or nothing.
mf_train() {
  local frozen=$1 plan
  shift
  mf_facts || exit $?
  plan=$(mf_python mf_scale.cluster prepare --root "$mf_root" ${frozen:+--frozen "$frozen"} "$@") || exit $?
  eval "$plan"
  mf_import_from "$mf_code"
  if [ -n "$mf_comment" ]; then
    scontrol update JobId="$mf_job" Comment="$mf_comment" ||
      mf_say "the job's comment cannot be set: a requeued start takes the code and configuration that are there then"
  fi
  mf_probe
  mf_exit=$?
  # Asked to stop before there was anybody to pass it to.
  [ "$mf_exit" -eq 0 ] && [ -n "$mf_signals" ] && mf_exit=85
  [ "$mf_exit" -eq 0 ] && mf_ranks train "${mf_arguments[@]}"
  mf_finish
}

mf_finish() {
  local answer=''
  mf_facts && answer=$(mf_python mf_scale.cluster decide --run "$mf_run" --code "$mf_exit" --signals "$mf_signals" \
    --cap "$mf_cap")
  [ "$answer" = requeue ] && mf_requeue
  exit "$mf_exit"
}

# Outside of a job: keep a copy of code and configuration now, and submit. Options of sbatch come before `--`.
mf_submit() {
  local script=$1 options=() word frozen
  shift
  for word in "$@"; do
    if [ "$word" = -- ]; then
      while [ "$1" != -- ]; do options+=("$1"); shift; done
      shift
      break
    fi
  done
  if ! command -v sbatch >/dev/null; then
    mf_say "there is no sbatch here: launch/local.sh trains on this machine"
    exit 2
  fi
  frozen=$(mf_python mf_scale.cluster freeze --root "$mf_root" "$@") || exit $?
  exec sbatch ${frozen:+--comment="mf_scale:$frozen"} ${options[@]+"${options[@]}"} "$mf_root/$script" "$@"
}

# $1: the job script. $2: the frozen copy that the job's comment names, or nothing. The rest is the command line.
mf_main() {
  local script=$1 frozen=$2
  shift 2
  if [ $# -lt 1 ]; then
    echo "usage: sbatch [options] $script CONFIG [key=value ...] [--live-code] [--freeze-anew]" >&2
    echo "   or: bash $script [options of sbatch --] CONFIG ..., which checks and keeps a copy before it submits" >&2
    exit 2
  fi
  mf_project "${frozen:-${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}}"
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    mf_submit "$script" "$@"
  fi
  mf_train "$frozen" "$@"
}
