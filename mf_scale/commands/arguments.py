"""What the commands' arguments share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from mf_scale.errors import UserError

OVERRIDES = "any key of the configuration, for example train.steps=500"
RANKS_PER_CORE = 16
"""Processes of this program that a core can be asked to serve, at most."""
Call = Callable[[argparse.Namespace, list[str]], int]
"""Options and the whole command line -> exit code."""


def add_command(commands: Any, name: str, text: str, call: Call) -> argparse.ArgumentParser:
    """A command of `mf-scale` with the options that all have."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    command.set_defaults(call=call)
    return command


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def add_processes(command: argparse.ArgumentParser) -> None:
    """The number of ranks to start here."""
    command.add_argument(
        "--processes", type=count, metavar="N", help="ranks on this machine (default: one a GPU, or 1)"
    )


def wanted_ranks(processes: int | None) -> int:
    """Ranks to start on this machine: as many as asked for, else one a GPU, at least one.

    UserError for more than a machine can hold: each takes a quarter of a GiB before it does anything.
    """
    from mf_scale.distributed.env import visible_gpus

    gpus, cores = visible_gpus(), os.cpu_count() or 1
    if processes is None:
        return max(1, gpus)
    most = max(gpus, RANKS_PER_CORE * cores)
    if processes > most:
        raise UserError(
            f"{processes:,} processes are more than this machine can serve: it has {cores} cores and {gpus} GPUs",
            where="--processes",
            remedy=f"Take {max(1, gpus)}, one a GPU, or at most {most}; more machines: docs/cluster.md.",
        )
    return processes
