"""`mf-scale data`: where the data of a run stands, and which samples a step takes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command, count


def add(commands: Any) -> None:
    """Its parts and their arguments."""
    text = "where the data of a run stands, and which samples a step takes"
    parts = commands.add_parser("data", help=text, description=text, allow_abbrev=False)
    parts = parts.add_subparsers(metavar="PART", required=True)
    position = add_command(parts, "position", "epoch and position of every source after a step", _position)
    samples = add_command(parts, "samples", "the samples of a step: keys, shards, epochs, in lane order", _samples)
    for command, wanted in ((position, False), (samples, True)):
        command.add_argument("run", metavar="RUN|CONFIG", help="run directory, or the configuration of one to come")
        command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
        command.add_argument(
            "--step",
            type=count,
            required=wanted,
            metavar="S",
            help="as metrics.jsonl counts them, from 1" + ("" if wanted else " (default: the last one taken)"),
        )
        command.add_argument("--json", action="store_true", help="print JSON")


def _position(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.training.position import as_rows, data_of, position_table, positions_after

    found, step = data_of(options.run, options.step, options.overrides)
    if options.json:
        print(json.dumps({"step": step, "sources": as_rows(positions_after(found, step))}))
    else:
        print(position_table(found, step))
    return 0


def _samples(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.training.position import as_rows, data_of, sample_table, samples_of

    found, step = data_of(options.run, options.step, options.overrides)
    if options.json:
        print(json.dumps({"step": step, "samples": as_rows(samples_of(found, step))}))
    else:
        print(sample_table(found, step))
    return 0
