# Sourced by launch/start.sh: what the job scripts have in common. Nothing here is written to but the run directory.
#   mf_main SCRIPT CONFIG [key=value ...]   in a job: check, train, requeue; outside of one: keep a copy and submit
#   mf_wait PID                      wait through signals; the exit code in mf_exit
#   mf_facts                         what SLURM says of this job, for the Python halves (mf_scale/cluster)
#   mf_requeue                       ask SLURM to start this job again
# Settings (environment): MF_ROOT the project's folder (default: where sbatch was called), MF_PYTHON its Python
# (default: MF_ROOT/.venv/bin/python), MF_CONTAINER and MF_CONTAINER_MOUNTS (launch/container.sh).

mf_launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 2

mf_say() { echo "mf_scale: $*" >&2; }

# Where the project is, which Python runs it, and in what container. $1: the folder that mf_scale is imported from.
mf_project() {
  mf_root=$root
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

# Whether this is the script of a job, and not a command typed inside an interactive one.
mf_in_job() {
  [ -n "${SLURM_JOB_ID:-}" ] && { [ "${ENVIRONMENT:-}" = BATCH ] || [ "$(basename "$0")" = slurm_script ]; }
}

# A command of SLURM's controller, which may be away for some minutes while it restarts or fails over. A job that is
# being ended has no time to wait.
mf_patiently() {
  local deadline=$((SECONDS + ${MF_PATIENCE:-600}))
  until timeout 30 "$@"; do
    case $mf_signals in *TERM*) return 1 ;; esac
    [ "$SECONDS" -lt "$deadline" ] || return 1
    sleep 10
  done
}

mf_facts() {
  if ! command -v scontrol >/dev/null; then
    mf_say "SLURM's commands are not in PATH on $(hostname): see launch/site.env"
    return 2
  fi
  MF_JOB_FACTS=$(mf_patiently scontrol show job "$mf_job")
  MF_JOB_NODES=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}")
  export MF_JOB_FACTS MF_JOB_NODES
  if [ -z "$MF_JOB_FACTS" ]; then
    mf_say "SLURM's controller does not tell of job $mf_job"
    return 75
  fi
}

# A trapped signal ends `wait` early; the last `wait` gives the true exit code.
mf_wait() {
  wait "$1"
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
  wait "$1"
  mf_exit=$?
}

# What has been ended meanwhile stays ended: SLURM would bring even a cancelled job back to life.
mf_requeue() {
  mf_facts || return
  case $MF_JOB_FACTS in
    *JobState=RUNNING* | *Reason=TimeLimit*) ;;
    *)
      mf_say "the job was ended meanwhile: it is not requeued"
      return
      ;;
  esac
  mf_patiently scontrol requeue "$mf_job" ||
    mf_say "SLURM does not requeue the job: submit the same command again, or chain jobs by --dependency=singleton"
}

# Bring the job back although its run directory can be neither read nor written; SLURM's own count bounds it.
mf_again() {
  local answer=''
  case $mf_exit in 0 | 2 | 3) return ;; esac
  mf_facts && answer=$(mf_python mf_scale.cluster again --code 75 --signals "$mf_signals" --resumes)
  if [ "$answer" = requeue ]; then mf_requeue; fi
}

# One look at every node: can it start Python, does it see the run directory, is its clock right, is its code the same.
mf_probe() {
  local began answers
  began=$(date +%s.%N)
  answers=$(timeout -k 5 "${MF_PROBE_SECONDS:-60}" srun --nodes="$mf_nodes" --ntasks="$mf_nodes" --ntasks-per-node=1 \
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

# Everything that can be looked at before the ranks start, by all of them together (docs/cluster.md): MF_DOCTOR=0 leaves
# it out, MF_DOCTOR=verbose prints all lines. In mf_exit what follows: 0 the job goes on, 2 a mistake, 75 a fault, 85 the
# job was asked to stop. Who does not come to an end is no judge: after MF_DOCTOR_SECONDS, or where it dies, the job goes
# on. The ranks have limits of time of their own, and what hangs for the doctor may be no more than slow.
mf_doctor() {
  local verbose='' limit=${MF_DOCTOR_SECONDS:-60} deadline late=''
  case ${MF_DOCTOR:-1} in 0 | no | off | false) return 0 ;; verbose) verbose=--verbose ;; esac
  case $limit in *[!0-9]*) mf_say "MF_DOCTOR_SECONDS=$limit is no number of seconds: 60 are taken" && limit=60 ;; esac
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$mf_cpus}"
  deadline=$((SECONDS + limit))
  # --overlap: what may be left of it must not keep the ranks' step from starting.
  srun --overlap --nodes="$mf_nodes" --ntasks="$mf_ranks" --ntasks-per-node="$mf_per_node" --cpus-per-task="$mf_cpus" \
    --kill-on-bad-exit=0 ${mf_srun[@]+"${mf_srun[@]}"} ${mf_inside[@]+"${mf_inside[@]}"} \
    "$python" -m mf_scale.cli doctor --in-job --seconds $((limit > 20 ? limit - 10 : limit / 2 + 1)) \
    ${verbose:+"$verbose"} "${mf_arguments[@]}" &
  mf_pid=$!
  while kill -0 "$mf_pid" 2>/dev/null; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      late=1
      kill -TERM "$mf_pid" 2>/dev/null
      sleep 2
      kill -KILL "$mf_pid" 2>/dev/null
    fi
    sleep 0.1
  done
  mf_wait "$mf_pid"
  mf_pid=''
  case $late$mf_exit in
    0 | 2 | 75) ;;
    138 | 143) mf_exit=85 ;; # USR1 or TERM, which nobody but SLURM sends it
    *)
      mf_say "the doctor came to no end within $limit s (exit code $mf_exit; MF_DOCTOR_SECONDS): the job goes on without it"
      mf_exit=0
      ;;
  esac
}

# The ranks: one task each, Python itself the task. --cpus-per-task is not inherited from sbatch since SLURM 22.05.
mf_ranks() {
  # Ranks of a node share its cores; without this each takes them all.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$mf_cpus}"
  # In the background, since a trap waits for the foreground command to end.
  srun --nodes="$mf_nodes" --ntasks="$mf_ranks" --ntasks-per-node="$mf_per_node" --cpus-per-task="$mf_cpus" \
    --kill-on-bad-exit=1 ${mf_srun[@]+"${mf_srun[@]}"} ${mf_inside[@]+"${mf_inside[@]}"} \
    "$python" -m mf_scale.cli "$@" &
  mf_pid=$!
  # Asked between the two lines above; asked twice is asked once.
  case $mf_signals in *USR1*) kill -USR1 "$mf_pid" 2>/dev/null ;; esac
  mf_wait "$mf_pid"
  mf_pid=''
}

# Check, train, and bring the job back where that makes sense.
mf_train() {
  local plan told
  mf_facts
  mf_exit=$?
  if [ "$mf_exit" -eq 0 ]; then
    # A job submitted from within another one has that one's count.
    told=${MF_JOB_FACTS#*Restarts=}
    told=${told%%[!0-9]*}
    [ "${SLURM_RESTART_COUNT:-0}" -le "${told:-0}" ] || export SLURM_RESTART_COUNT="$told"
    plan=$(mf_python mf_scale.cluster prepare --root "$mf_root" ${frozen:+--frozen "$frozen"} "$@")
    mf_exit=$?
  fi
  if [ "$mf_exit" -ne 0 ]; then
    mf_again
    exit "$mf_exit"
  fi
  eval "${plan#*'# the plan'}" # containers and modules may greet before it
  mf_import_from "$mf_code"
  if [ -n "$mf_comment" ]; then
    scontrol update JobId="$mf_job" Comment="$mf_comment" ||
      mf_say "the job's comment cannot be set: a requeued start takes the code and configuration that are there then"
  fi
  mf_probe
  mf_exit=$?
  rm -f -- "$mf_token"
  # Asked to stop before there was anybody to pass it to, or while there was nobody who had anything to save.
  [ "$mf_exit" -eq 0 ] && [ -z "$mf_signals" ] && mf_doctor
  [ "$mf_exit" -eq 0 ] && [ -n "$mf_signals" ] && mf_exit=85
  [ "$mf_exit" -eq 0 ] && mf_ranks train "${mf_arguments[@]}"
  mf_finish
}

mf_finish() {
  local answer=''
  if mf_facts && answer=$(mf_python mf_scale.cluster decide --run "$mf_run" --code "$mf_exit" \
    --signals "$mf_signals" --cap "$mf_cap"); then
    if [ "$answer" = requeue ]; then mf_requeue; fi
  else
    mf_again
  fi
  exit "$mf_exit"
}

# Outside of a job: keep a copy of code and configuration now, and submit. Options of sbatch come before `--`.
mf_submit() {
  local script=$1 options=() comment='' word frozen
  shift
  for word in "$@"; do
    if [ "$word" = -- ]; then
      while [ "$1" != -- ]; do
        case $1 in --comment=*) comment="${1#--comment=} " ;; *) options+=("$1") ;; esac
        shift
      done
      shift
      break
    fi
  done
  if ! command -v sbatch >/dev/null; then
    mf_say "there is no sbatch here: launch/local.sh trains on this machine"
    exit 2
  fi
  frozen=$(mf_python mf_scale.cluster freeze --root "$mf_root" "$@") || exit $?
  comment=$comment${frozen:+mf_scale:$frozen}
  exec sbatch ${comment:+--comment="$comment"} ${options[@]+"${options[@]}"} "$mf_root/$script" "$@"
}

# $1: the job script. The rest is the command line.
mf_main() {
  local script=$1
  shift
  if [ $# -lt 1 ]; then
    echo "usage: sbatch [options] $script CONFIG [key=value ...] [--live-code] [--freeze-anew]" >&2
    echo "   or: bash $script [options of sbatch --] CONFIG ..., which checks and keeps a copy before it submits" >&2
    exit 2
  fi
  mf_project "${frozen:-$root}"
  if ! mf_in_job; then
    mf_submit "$script" "$@"
  fi
  mf_train "$@"
}
