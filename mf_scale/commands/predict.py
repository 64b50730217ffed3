"""`mf-scale predict`: segment images."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "predict", "segment images with a run or checkpoint", _run)
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    command.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="settings", help=OVERRIDES)
    command.add_argument("--run", required=True, metavar="RUN", help="run directory or checkpoint folder")
    command.add_argument(
        "--task", choices=("semantic", "panoptic", "instance"), default="panoptic", help="default: panoptic"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for overlays, maps and segment lists")


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.evaluation.predict import predict_images

    return predict_images(options.images, options.run, options.out, task=options.task, overrides=options.settings)
