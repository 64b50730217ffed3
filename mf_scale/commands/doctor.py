"""`mf-scale doctor`: everything that can be wrong with machine, data and configuration, at once."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command, add_processes, count, wanted_ranks
from mf_scale.errors import UserError

_SECONDS = 60


def add(commands: Any) -> None:
    """Its arguments."""
    text = "look for everything that would keep a run from starting well, on a login node or inside a job"
    command = add_command(commands, "doctor", text, _run)
    command.add_argument(
        "items",
        nargs="*",
        metavar="CONFIG|key=value",
        help=f"a configuration file (none: the machine alone), and {OVERRIDES}",
    )
    command.add_argument(
        "--ranks", type=count, metavar="N", help="ranks that the job will have (default: those started here)"
    )
    command.add_argument("--reinit-head", action="store_true", help="as of mf-scale train")
    command.add_argument("--json", action="store_true", help="print all that is known as JSON")
    command.add_argument("--verbose", action="store_true", help="print the numbers behind every line")
    command.add_argument(
        "--seconds", type=count, default=_SECONDS, metavar="S", help=f"limit of time (default: {_SECONDS})"
    )
    command.add_argument(
        "--in-job",
        action="store_true",
        help="for job scripts: print what is not well, exit with 2 for a mistake and 75 for a fault",
    )
    command.set_defaults(overrides=[])
    add_processes(command)


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    from mf_scale.distributed.env import world_from_environment
    from mf_scale.distributed.launch import allow_stop_signals, launch
    from mf_scale.training.preemption import install_handlers

    world, began = world_from_environment(), time.monotonic()
    try:
        wanted = _wanted(options, began)
    except UserError as error:
        error.said_by_first_rank = not world.first  # every rank of srun makes the same mistake
        raise
    if world.size == 1 and (ranks := wanted_ranks(options.processes)) > 1:
        return launch(arguments, ranks, install_handlers().signals)
    allow_stop_signals()  # nothing is to be saved: they end it at once
    from mf_scale.doctor.examination import examine

    return examine(wanted, world)


def _wanted(options: argparse.Namespace, began: float) -> Any:
    from mf_scale.config.load import load_config
    from mf_scale.config.validate import validate
    from mf_scale.doctor.wanted import Wanted

    items = [*options.items, *options.overrides]
    overrides = [item for item in items if "=" in item and not Path(item).is_file()]
    files = [item for item in items if item not in overrides]
    if len(files) > 1 or (overrides and not files):
        told = (
            f"{' and '.join(files[:2])} are both no key=value" if files else "there are overrides and no configuration"
        )
        raise UserError(told, where="command line", remedy="The arguments are [CONFIG] [key=value ...].")
    overrides += ["train.reinit_head=true"] if options.reinit_head else []
    config = load_config(files[0], overrides) if files else None
    broken = None
    try:
        if config is not None:
            validate(config)
    except UserError as error:
        broken = error
    return Wanted(
        file=files[0] if files else "",
        overrides=tuple(overrides),
        config=config,
        broken=broken,
        ranks=options.ranks,
        seconds=float(options.seconds),
        began=began,
        in_job=options.in_job,
        as_json=options.json,
        verbose=options.verbose,
    )
