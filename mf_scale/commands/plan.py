"""`mf-scale plan`: what configurations cost."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command, count
from mf_scale.errors import EXIT_USER, UserError


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "plan", "what configurations cost: parameters, FLOPs, batches", _run)
    command.add_argument("items", nargs="+", metavar="CONFIG|key=value", help=f"configuration files, and {OVERRIDES}")
    command.add_argument("--processes", type=count, default=8, metavar="N", help="ranks to plan for (default: 8)")
    command.add_argument("--json", action="store_true", help="print all numbers as JSON")
    command.set_defaults(overrides=[])


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    from mf_scale.plan import as_json, page, plan_config, table

    items = [*options.items, *options.overrides]
    overrides = [item for item in items if "=" in item and not Path(item).is_file()]
    files = [item for item in items if item not in overrides]
    if not files:
        raise UserError("no configuration file to plan", where="command line", remedy="Name one, or several.")
    plans, refused = [], []
    for file in files:
        try:
            plans.append(plan_config(file, overrides, options.processes))
        except UserError as error:
            if len(files) == 1:
                raise
            refused.append(error)
    if plans:
        print(as_json(plans) if options.json else page(plans[0]) if len(files) == 1 else table(plans))
    for refusal in refused:
        print(f"mf-scale: {refusal}", file=sys.stderr)
    return EXIT_USER if refused else 0
