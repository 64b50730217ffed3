"""`mf-scale import`: a trained model from others."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "import", "take over a trained model from another program", _run)
    command.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="transformers folder, checkpoint of the original MaskFormer (.pkl, .pth), or a file in names of mf_scale",
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    command.add_argument("--out", required=True, metavar="DIR", help="new folder, for evaluate, predict and init_from")
    command.add_argument("--config", metavar="CONFIG", help="configuration of the model (default: the folder's own)")
    command.add_argument(
        "--vocabulary", metavar="FILE", help="its classes (default: the folder's own, all of them things)"
    )


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    from mf_scale.exchange import import_model

    print(
        import_model(
            Path(options.weights),
            Path(options.out),
            config=options.config,
            vocabulary=options.vocabulary,
            overrides=options.overrides,
        )
    )
    return 0
