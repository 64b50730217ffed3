"""`mf-scale evaluate`: metrics of a run or checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command, add_processes, wanted_ranks


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "evaluate", "mIoU, PQ and mask AP of a run or checkpoint", _run)
    command.add_argument("run", metavar="RUN", help="run directory or checkpoint folder")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    command.add_argument("--split", choices=("val", "train"), default="val", help="which source (default: val)")
    add_processes(command)


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    from mf_scale.distributed.env import world_from_environment
    from mf_scale.distributed.launch import allow_stop_signals, launch
    from mf_scale.training.preemption import install_handlers

    world = world_from_environment()
    if world.size == 1 and (ranks := wanted_ranks(options.processes)) > 1:
        return launch(arguments, ranks, install_handlers().signals)
    allow_stop_signals()
    from mf_scale.evaluation.runner import evaluate_run

    table = evaluate_run(options.run, options.overrides, world, split=options.split)
    if world.first:
        print(table)
    return 0
