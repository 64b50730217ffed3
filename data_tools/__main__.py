"""`python -m data_tools pack|index|verify|stats|preview`: parse, call, exit code."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from data_tools import commands
from data_tools.problems import disk_faults
from mf_scale.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one paragraph on stderr and exit code 2, Ctrl-C one line and 130."""
    options = argparse.Namespace(debug=False, interrupted="")
    try:
        _parser().parse_args(arguments, options)
        with disk_faults():
            options.run(options)
        return 0
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        pass  # told below, where its frames are gone and have closed their bars
    print(f"interrupted{options.interrupted}", file=sys.stderr)
    return 130


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line are told like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, remedy=f"`{self.prog} --help` says what it takes.")


def _at_least(least: int) -> Callable[[str], int]:
    """Argument type: a whole number, `least` or more."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return parse


def _part(text: str) -> tuple[int, int]:
    """Argument type: i/n, the first part being 0."""
    found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n, the first of n parts being 0/n and the last n-1/n")
    return int(found[1]), int(found[2])


def _how_many(text: str) -> int:
    """Argument type: a whole number from 1, or `all` (0)."""
    if text == "all":
        return 0
    if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number of 1 or more nor `all`")
    return int(text)


def _values(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers with commas between them."""
    if not re.fullmatch(r"\d+(,\d+)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of values like 0,255")
    return tuple(int(value) for value in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m data_tools", description="Prepare data for mf_scale.")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument(
        "--workers",
        type=_at_least(1),
        default=len(os.sched_getaffinity(0)),
        help="processes; default all cores (%(default)s)",
    )
    found = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        sub = found.add_parser(name, parents=[common], help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    _pack_options(command("pack", commands.pack, "Pack a dataset into shards with an index."))
    _index_options(command("index", commands.index, "Index shards that were made elsewhere."))
    verify = command("verify", commands.verify, "Check checksums, decode every sample, check labels.")
    stats = command("stats", commands.stats, "Images, segments and pixels of each class.")
    preview = command("preview", commands.preview, "A sheet of samples with their segments in colour and named.")
    for sub in (verify, stats, preview):
        sub.add_argument("source", help="folder or url of a packed source")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    stats.add_argument("--json", type=Path, metavar="FILE", help="write all counts")
    stats.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="count by the classes of a run: its vocabulary.json"
    )
    stats.add_argument("--picture", type=Path, metavar="FILE", help="draw them, as PNG")
    preview.add_argument("picture", type=Path, help="PNG to write")
    preview.add_argument("--count", type=_at_least(1), default=12, help="samples shown; default %(default)s")
    return parser


def _pack_options(pack: argparse.ArgumentParser) -> None:
    from data_tools.formats import FORMATS

    pack.add_argument("format", help=f"format of the dataset: {', '.join(FORMATS)}")
    pack.add_argument("source", type=Path, help="folder of the dataset")
    pack.add_argument("target", type=Path, help="folder for shards and index")
    pack.add_argument("--split", required=True, help="which part of the dataset, e.g. train; also names the shards")
    pack.add_argument(
        "--shard-size", default="256MiB", help="samples (1000) or MiB (256MiB) of a shard; default %(default)s"
    )
    pack.add_argument("--seed", type=_at_least(0), default=0, help="seed of the order of samples; default %(default)s")
    pack.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="i/n",
        help="write every n-th shard from the i-th: n such commands, on any hosts, share the work",
    )
    pack.add_argument(
        "--check-maps",
        type=_how_many,
        default=1000,
        metavar="N|all",
        help="label maps whose values are held against their declared meaning, and samples a dry run tries; "
        "default %(default)s",
    )
    pack.add_argument("--dry-run", action="store_true", help="check lists, ids and samples, write nothing")
    pack.add_argument("--vocabulary", type=Path, metavar="FILE", help="instead of the format's own (JSON)")
    _common_options(pack)


def _index_options(index: argparse.ArgumentParser) -> None:
    index.add_argument("source", type=Path, help="folder of the shards")
    index.add_argument("--vocabulary", type=Path, metavar="FILE", required=True, help="vocabulary file (JSON)")
    index.add_argument("--kind", choices=("panoptic", "semantic", "instance"), help="of annotation")
    index.add_argument(
        "--labels", metavar="SUFFIX", help="samples are an image and one grey PNG of values with this suffix"
    )
    for name in ("ignore", "background"):
        index.add_argument(f"--{name}", type=_values, metavar="VALUES", help=f"of the label maps that mean {name}")
    index.add_argument("--offset", type=int, help="value + offset is the id of a class; default 0")
    _common_options(index)


def _common_options(sub: argparse.ArgumentParser) -> None:
    """What pack and index share."""
    for name, what in (("--crowd", "crowd segments"), ("--unlabelled", "pixels without a segment")):
        sub.add_argument(
            name,
            choices=("none", "ignore"),
            default="none",
            help=f"what {what} are in training: negatives (none, as in the paper) or outside the loss (ignore)",
        )
    sub.add_argument("--overwrite", action="store_true", help="replace shards and index that are there")
    sub.add_argument("--accept-ids", action="store_true", help="values that look shifted are right as they are")


if __name__ == "__main__":
    sys.exit(main())
