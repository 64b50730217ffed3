"""A rank of launch/local.sh: `mf-scale ARGUMENTS` under torch's elastic agent, run as a module."""

from __future__ import annotations

import os

from mf_scale.distributed.ranks import enter, exit_code_for_agent

if __name__ == "__main__":
    enter()  # before anything slow
    from mf_scale import cli

    os._exit(exit_code_for_agent(cli.to_the_end()))
