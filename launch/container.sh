# Sourced by job.sh: the container that Python runs in, chosen by MF_CONTAINER. `mf_container` sets three lists of words:
#   mf_head    before Python on the node of the job script
#   mf_srun    options of srun
#   mf_inside  before Python in a task of srun
# and `python` to MF_PYTHON, the Python inside of the container (default: python3).
#   MF_CONTAINER          *.sif, a sandbox folder, or docker://, oras://, library://: apptainer (or singularity);
#                         anything else is an image for srun --container-image (pyxis)
#   MF_CONTAINER_MOUNTS   what is mounted besides the project's and the present folder: FROM[:TO[:FLAGS]],...
# Data and run directories must be among the mounts. The environment goes into the container as it is.
mf_container() {
  mf_head=() mf_srun=() mf_inside=()
  [ -n "${MF_CONTAINER:-}" ] || return 0
  python=${MF_PYTHON:-python3}
  local mounts=$mf_root:$mf_root mount rest=${MF_CONTAINER_MOUNTS:-}
  [ "$PWD" = "$mf_root" ] || mounts+=,$PWD:$PWD
  while [ -n "$rest" ]; do
    mount=${rest%%,*}
    [ "$mount" = "$rest" ] && rest='' || rest=${rest#*,}
    case $mount in '') ;; *:*) mounts+=,$mount ;; *) mounts+=,$mount:$mount ;; esac
  done
  case $MF_CONTAINER in
    docker://* | oras://* | library://*) mf_apptainer "$mounts" ;;
    *.sif)
      if [ ! -f "$MF_CONTAINER" ]; then
        mf_say "MF_CONTAINER=$MF_CONTAINER: there is no such image on $(hostname)"
        return 2
      fi
      mf_apptainer "$mounts"
      ;;
    *) if [ -d "$MF_CONTAINER" ]; then mf_apptainer "$mounts"; else mf_pyxis "$mounts"; fi ;;
  esac
}

mf_apptainer() {
  local program
  program=$(command -v apptainer || command -v singularity) || {
    mf_say "MF_CONTAINER=$MF_CONTAINER needs apptainer or singularity in PATH (launch/site.env may load its module)"
    return 2
  }
  mf_inside=("$program" exec --bind "$1" --pwd "$PWD")
  if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ] || [ -e /dev/nvidiactl ]; then mf_inside+=(--nv); fi
  mf_inside+=("$MF_CONTAINER")
  mf_head=("${mf_inside[@]}")
}

mf_pyxis() {
  local help
  help=$(srun --help 2>/dev/null)
  case $help in
    *--container-image*) ;;
    *)
      mf_say "MF_CONTAINER=$MF_CONTAINER: this srun knows no --container-image (pyxis is not installed); take an apptainer" \
        "image (*.sif, docker://...)"
      return 2
      ;;
  esac
  mf_srun=(--container-image="$MF_CONTAINER" --container-mounts="$1" --container-workdir="$PWD")
  # Else what the image sets of these wins.
  case $help in *--container-env*) mf_srun+=(--container-env=PYTHONPATH,PYTHONSAFEPATH,OMP_NUM_THREADS) ;; esac
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    # A step of one task; --overlap, since the ranks' step may hold everything.
    mf_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="${SLURMD_NODENAME:-$(hostname -s)}" --input=0
      "${mf_srun[@]}")
  fi
}
