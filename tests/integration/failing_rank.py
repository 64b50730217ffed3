"""A rank that fails where it is told to: `failing_rank.py FOLDER WHERE RANKS`. Ends as the program does.

WHERE: early (before the ranks have met), late or killed. RANKS such as 01; others wait for them in a collective. FOLDER
is a run directory.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mf_scale import cli
from mf_scale.distributed import comm
from mf_scale.distributed.env import world_from_environment
from mf_scale.distributed.launch import allow_stop_signals


def work(folder: Path, where: str, failing: str) -> int:
    allow_stop_signals()
    world = world_from_environment()
    fails = str(world.rank) in failing
    if where == "early" and fails:
        raise ValueError(f"told to fail early as {world.rank}")
    if where == "killed" and fails:
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "killed":
        return 0
    with comm.process_group(world, timeout=30, meeting=folder):
        comm.barrier()
        if fails:
            raise ValueError(f"told to fail late as {world.rank}, with s3://user:pass@host/x")
        comm.barrier()
    return 0


def main() -> None:
    cli.main = lambda arguments=None: work(Path(sys.argv[1]), *sys.argv[2:4])
    if "MF_RANKS" in os.environ:
        from mf_scale.distributed.ranks import enter, exit_code_for_agent

        enter()
        os._exit(exit_code_for_agent(cli.to_the_end()))
    cli.run()


if __name__ == "__main__":
    main()
