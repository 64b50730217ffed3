"""`mf-scale predict`: segment images."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command, add_processes, count, wanted_ranks

INPUT = (
    "image files or urls, folders of images, a text file with a path or url a line (.txt, .lst, .list), tars, or a "
    "packed source"
)


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "predict", "segment images with a run or checkpoint", _run)
    command.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUT)
    command.add_argument("--run", required=True, metavar="RUN", help="run directory or checkpoint folder")
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    command.add_argument(
        "--task", choices=("semantic", "panoptic", "instance"), default="panoptic", help="default: panoptic"
    )
    command.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="settings", help=OVERRIDES)
    command.add_argument(
        "--overlay",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw each image with its segments and a legend (default: where results are three files an image)",
    )
    command.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="classes that overlays show (all)")
    command.add_argument(
        "--part-size", type=count, metavar="N", help="write parts of N images: a tar and JSON lines (1000 for sources)"
    )
    command.add_argument(
        "--image-ids",
        choices=("positions", "names"),
        default="positions",
        help="image_id in COCO's files: the place in the input, or the number that is the image's name, as in COCO",
    )
    command.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="write one COCO file of all parts (default: up to 100,000 images)",
    )
    command.add_argument(
        "--share", type=_share, default=(0, 1), metavar="I/N", help="share I of N, from 0, as of a SLURM array's tasks"
    )
    command.add_argument("--overwrite", action="store_true", help="remove the prediction in DIR and begin anew")
    add_processes(command)


def _share(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0/4, 1/4, 2/4 or 3/4")
    return int(number), int(of)


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    from mf_scale.distributed.env import world_from_environment
    from mf_scale.distributed.launch import allow_stop_signals, launch
    from mf_scale.evaluation.prediction.input import open_input
    from mf_scale.evaluation.prediction.words import Options, Share
    from mf_scale.training.preemption import install_handlers

    world, flag = world_from_environment(), install_handlers()
    wanted = Options(
        task=options.task,
        overrides=tuple(options.settings),
        overlay=options.overlay,
        classes=tuple(options.classes),
        part_size=options.part_size,
        image_ids=options.image_ids,
        merge=options.merge,
    )
    share = Share(options.share[0], options.share[1], world.rank, world.size)
    if world.size == 1 and (ranks := wanted_ranks(options.processes)) > 1:
        ranks = min(ranks, open_input(options.inputs, wanted)[0].parts)
        if ranks > 1:
            if options.overwrite:  # here, as the ranks know nothing of each other
                from mf_scale.evaluation.prediction.begin import refuse_to_overwrite, remove_checked

                refuse_to_overwrite(share)
                remove_checked(options.inputs, options.run, options.out, wanted)
                arguments = [word for word in arguments if word != "--overwrite"]
            return launch(arguments, ranks, flag.signals)
    allow_stop_signals()
    from mf_scale.evaluation.prediction.parts import predict_images

    return predict_images(
        options.inputs,
        options.run,
        options.out,
        wanted,
        share=share,
        overwrite=options.overwrite,
        stop=lambda: bool(flag.signals),
    )
