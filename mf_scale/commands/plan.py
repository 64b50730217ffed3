"""`mf-scale plan`: what configurations cost."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from mf_scale.commands.arguments import OVERRIDES, add_command, count
from mf_scale.errors import EXIT_USER, UserError

if TYPE_CHECKING:
    from mf_scale.plan.planning import Wanted

_RANKS = 8
_MOST_RANKS = 1 << 20
"""More than any machine has: a slip of the keyboard."""


def add(commands: Any) -> None:
    """Its arguments."""
    text = "what configurations cost: parameters, FLOPs, memory by ZeRO stage, what fits, time, CPU cores, checkpoints"
    command = add_command(commands, "plan", text, _run)
    command.add_argument("items", nargs="+", metavar="CONFIG|key=value", help=f"configuration files, and {OVERRIDES}")
    command.add_argument("--nodes", type=count, metavar="N", help="nodes to plan for (default: 1)")
    command.add_argument("--gpus-per-node", type=count, metavar="G", help=f"GPUs of each (default: {_RANKS})")
    command.add_argument("--processes", type=count, metavar="N", help=f"ranks, in place of both (default: {_RANKS})")
    command.add_argument("--gpu-memory", metavar="SIZE", help="of one GPU, as 141GiB, 80GB or 24576MiB: what fits")
    command.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="whose activations are computed (default: cuda)"
    )
    command.add_argument("--stages", action="store_true", help="every ZeRO stage with every offloading too")
    command.add_argument(
        "--measure", action="store_true", help="run one micro-batch and the data path here, and say what they took"
    )
    command.add_argument("--images-per-second", type=_rate, metavar="X", help="of one GPU, for the time it takes")
    command.add_argument(
        "--worker-rate", type=_rate, metavar="X", help="images/s of one loader process, as `mf-scale bench data` says"
    )
    command.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what no configuration tells, several times: images, image_bytes, gpu_hours, ... (docs/scale.md)",
    )
    command.add_argument(
        "--formulas", action="store_true", help="formulas of data, checkpoints and restarts in symbols"
    )
    command.add_argument("--json", action="store_true", help="print all numbers as JSON")
    command.set_defaults(overrides=[])


def _rate(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    items = [*options.items, *options.overrides]
    overrides = [item for item in items if "=" in item and not Path(item).is_file()]
    files = [item for item in items if item not in overrides]
    if not files:
        raise UserError("no configuration file to plan", where="command line", remedy="Name one, or several.")
    wanted = _wanted(options, several=len(files) > 1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler speaks of GPUs that are not there
    from mf_scale.plan.as_json import as_json
    from mf_scale.plan.planning import plan_config
    from mf_scale.plan.table import table
    from mf_scale.plan.text import page, refusal

    plans, refused = [], []
    for file in files:
        try:
            plans.append(plan_config(file, overrides, wanted))
        except UserError as error:
            if len(files) == 1:
                raise
            refused.append(str(error))
    if plans:
        print(
            as_json(plans)
            if options.json
            else table(plans)
            if len(files) > 1
            else page(plans[0], formulas=options.formulas)
        )
    refused += [said for plan in plans if (said := refusal(plan)) is not None]
    for said in refused:
        print(f"mf-scale: {said}", file=sys.stderr)
    return EXIT_USER if refused else 0


def _memory(text: str) -> int:
    """Bytes of a GPU; UserError where nothing is left behind the margin."""
    from mf_scale.plan.fit import LEAST_MARGIN
    from mf_scale.plan.sizes import GIB, parse_size

    size = parse_size(text, where="--gpu-memory")
    if size <= LEAST_MARGIN:
        raise UserError(
            f"{text} is {'less than' if size < LEAST_MARGIN else 'no more than'} the {LEAST_MARGIN / GIB:g} GiB that "
            "are left free for what no tensor shows",
            where="--gpu-memory",
            remedy="Give the whole memory of one GPU, as 80GiB.",
        )
    return size


def _wanted(options: argparse.Namespace, *, several: bool) -> Wanted:
    """What is asked about; UserError for options that do not go together."""
    from mf_scale.plan.assumed import parse_assumed
    from mf_scale.plan.planning import Wanted

    placed = options.nodes is not None or options.gpus_per_node is not None
    if placed and options.processes is not None:
        raise UserError(
            "--processes counts all ranks, as --nodes and --gpus-per-node do",
            where="command line",
            remedy="Give one or the other.",
        )
    if several and options.measure:
        raise UserError(
            "--measure runs one configuration, and several are named", where="command line", remedy="Name one."
        )
    nodes = options.nodes or 1
    ranks = nodes * (options.gpus_per_node or _RANKS) if placed else options.processes or _RANKS
    if ranks > _MOST_RANKS:
        raise UserError(
            f"{ranks:,} ranks are more than can be planned for",
            where="command line",
            remedy=f"Take at most {_MOST_RANKS:,}.",
        )
    memory = _memory(options.gpu_memory) if options.gpu_memory is not None else None
    return Wanted(
        ranks=ranks,
        nodes=nodes,
        memory=memory,
        device=options.device,
        measure=options.measure,
        images_per_second=options.images_per_second,
        worker_rate=options.worker_rate,
        offloads=options.stages,
        activations=memory is not None or options.measure or not several,
        assumed=parse_assumed(options.assume),
    )
