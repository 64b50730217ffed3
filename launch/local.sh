#!/usr/bin/env bash
# Train on this machine without SLURM, through torch's elastic launcher; comes back by itself.
#   launch/local.sh CONFIG [key=value ...] [--processes N]
# 0 done, 2 a mistake and 3 a guard end it. Ctrl-C or TERM to this script stops for good: the state is committed (85),
# and the same command goes on. Whatever else ended the ranks (a stop request to one of them, one that was killed,
# storage or network that failed), they start again from the last commit, until launch.fruitless_starts of them in a
# row came no further. Killed outright (-9) it takes its ranks along.
# On several machines that share the run directory and the data, the same command on each of them with
#   MF_NNODES=2 MF_RDZV_ENDPOINT=HOST:PORT launch/local.sh ...
# HOST is one of the machines, PORT is free there. All have the same number of ranks; a machine that was away joins
# again by the same command.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
. "$root/launch/env.sh"
python=${MF_PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m mf_scale.commands.local "$@"
