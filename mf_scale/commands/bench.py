"""`mf-scale bench`: measurements with a peer in the same run."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import add_command, count


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "bench", "measure a part against its peers, in one process", _run)
    command.add_argument("part", choices=("loss",), help="loss: matching and mask losses, from the embeddings")
    for name, default, text in (
        ("images", 2, "images of the batch"),
        ("queries", 100, "queries"),
        ("segments", 15, "segments of each image"),
        ("cells", 128, "height and width of the mask logits"),
        ("size", 512, "height and width of the segment map"),
        ("layers", 6, "supervised decoder layers"),
        ("channels", 256, "channels of the embeddings"),
        ("classes", 150, "classes"),
        ("repeats", 3, "rounds, alternating between the contestants, after one that warms up"),
    ):
        command.add_argument(f"--{name}", type=count, default=default, metavar="N", help=f"{text} (default: {default})")
    command.add_argument("--threads", type=count, metavar="N", help="threads on a CPU (default: torch's)")
    command.add_argument("--reference", action="store_true", help="measure the plain reference too (slow)")
    command.add_argument("--json", metavar="FILE", help="write all numbers there")


def _run(options: argparse.Namespace, _: list[str]) -> int:
    import torch

    from mf_scale.bench.inputs import Shape
    from mf_scale.bench.loss import bench_loss

    if options.threads:
        torch.set_num_threads(options.threads)
    shape = Shape(**{name: getattr(options, name) for name in Shape.__dataclass_fields__})
    print(bench_loss(shape, repeats=options.repeats, reference=options.reference, json_file=options.json))
    return 0
