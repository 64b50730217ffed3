"""A rank of launch/local.sh: `mf-scale ARGUMENTS` under torch's elastic agent, run as a module."""

from __future__ import annotations

import contextlib
import os
import sys

from mf_scale.distributed.ranks import enter, exit_code_for_agent

if __name__ == "__main__":
    enter()  # before anything slow
    from mf_scale import cli

    code = cli.main()
    cli._wait_for_writers()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code_for_agent(code))
