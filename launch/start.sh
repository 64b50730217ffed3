# Sourced first by every job script, with `root` set to the project's folder: which job this is, and which copy of the
# program it takes. Short, since it is the one file that a requeued start takes from the project as it is then.

mf_signals='' mf_pid='' mf_exit=0
# First of all: an untrapped USR1 kills the batch shell. Of the two only USR1 is passed on: SLURM has sent TERM to the
# ranks itself, and a TERM to srun costs their last lines.
trap 'mf_signals="$mf_signals USR1"; [ -n "$mf_pid" ] && kill -USR1 "$mf_pid" 2>/dev/null' USR1
trap 'mf_signals="$mf_signals TERM"' TERM

# SLURM's commands may come by the site's modules, which do not expect `set -u`.
if [ -f "$root/launch/site.env" ]; then
  set +u
  . "$root/launch/site.env"
  set -u
fi
mf_site_read=1

# sbatch from within another job hands its variables on.
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && [ "${SLURM_JOB_ID:-}" != "$SLURM_ARRAY_JOB_ID" ]; then
  case $(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null) in
    '' | *"ArrayJobId=$SLURM_ARRAY_JOB_ID "*) ;;
    *) unset "${!SLURM_ARRAY_@}" ;;
  esac
fi
unset "${!SLURM_CPU_BIND@}" "${!SLURM_NTASKS_PER_GPU@}" RANK WORLD_SIZE LOCAL_RANK 2>/dev/null
# With --export=NONE, which some sites ask for, srun would hand nothing on to the ranks.
export SLURM_EXPORT_ENV=ALL

# A task of an array has two names; the plain number of its last one is the whole array's.
mf_job=${SLURM_JOB_ID:-}
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || mf_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# A start that was requeued, or submitted by the script itself, takes everything from the copy that was made of what was
# submitted: the job's comment names it.
frozen=''
if [ -n "$mf_job" ]; then
  for wait in 1 5 15 0; do
    mf_job_facts=$(scontrol show job "$mf_job" 2>/dev/null) && break
    sleep "$wait"
  done
  frozen=$(sed -n 's/^ *Comment=.*mf_scale: *//p' <<<"$mf_job_facts" | sed 's/ *$//')
fi
if [ -n "$frozen" ]; then
  # A node that has just come back may not have mounted it yet.
  for wait in 1 4 10 15 30 0; do
    [ -f "$frozen/launch/job.sh" ] && break
    sleep "$wait"
  done
fi
if [ -n "$frozen" ] && [ ! -f "$frozen/launch/job.sh" ]; then
  . "$root/launch/job.sh"
  mf_say "the frozen code is not visible on $(hostname): $frozen"
  mf_project "$root"
  mf_exit=75
  mf_again
  exit 75
fi
. "${frozen:-$root}/launch/job.sh"
