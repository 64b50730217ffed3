#!/usr/bin/env bash
#SBATCH --job-name=mf_sweep
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%A_%a.log
# Train every run of a grid (mf_scale/cluster/grid.py says how one is written), a task of a SLURM array each. Each has
# its own run directory below the configuration's run_dir and comes back as a run of launch/multinode.sh does; nodes and
# GPUs asked for are those of one run. At the end of each the table summary.md beside the runs is renewed, the last one
# prints it into its log.
#   bash launch/sweep.sh GRID CONFIG [key=value ...]          check all runs, show them and the line that submits them
#   sbatch --array=0-7%2 [options] launch/sweep.sh GRID CONFIG [key=value ...]
# The array must fit the grid; some runs alone: --array=3,5, or for the first few MF_SWEEP_PART=1 sbatch --array=0-1 ...
set -u
root=${MF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$root/launch/start.sh" ]; then
  echo "sweep.sh: $root is not the project's folder: submit from there or set MF_ROOT" >&2
  exit 2
fi
. "$root/launch/start.sh"
if [ $# -lt 2 ]; then
  echo "usage: bash launch/sweep.sh GRID CONFIG [key=value ...], which shows the runs" >&2
  echo "   or: sbatch --array=0-N [options] launch/sweep.sh GRID CONFIG [key=value ...] [--live-code]" >&2
  exit 2
fi
mf_project "${frozen:-$root}"
if ! mf_in_job; then
  mf_python mf_scale.cluster sweep-list "$@"
  exit
fi

mf_facts && chosen=$(mf_python mf_scale.cluster sweep-run ${frozen:+--frozen "$frozen"} "$@")
mf_exit=$?
if [ "$mf_exit" -ne 0 ]; then
  mf_again
  exit "$mf_exit"
fi
eval "${chosen#*'# the plan'}"
trap 'mf_python mf_scale.cluster sweep-summary "$mf_sweep"' EXIT
mf_train "${mf_words[@]}"
