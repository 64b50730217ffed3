"""`mf-scale export`: a trained model for others."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command, count


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "export", "write a trained model for others, without what training needs", _run)
    command.add_argument("run", metavar="RUN", help="run directory or checkpoint folder")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    command.add_argument("--out", metavar="DIR", help="new folder (default: RUN/export, or RUN/export-FORMAT)")
    command.add_argument(
        "--format",
        choices=("safetensors", "torch", "onnx", "transformers"),
        default="safetensors",
        help="safetensors: a folder for evaluate, predict and train.init_from; torch: a torch.export program; onnx; "
        "transformers: a folder for from_pretrained (default: safetensors)",
    )
    command.add_argument(
        "--size",
        nargs=2,
        type=count,
        metavar=("H", "W"),
        help="size of the images of a program (default: eval.short_side, both)",
    )


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.export import export_run

    size = (options.size[0], options.size[1]) if options.size else None
    print(export_run(options.run, options.out, format=options.format, size=size, overrides=options.overrides))
    return 0
