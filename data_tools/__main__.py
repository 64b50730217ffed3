"""`python -m data_tools pack|index|verify|stats|preview`: parse, call, print."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

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
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return number

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m data_tools", description="Prepare data for mf_scale.")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    pack = command("pack", _pack, "Pack a dataset into shards with an index.")
    pack.add_argument("format", help="format of the dataset, e.g. coco_panoptic")
    pack.add_argument("source", type=Path, help="folder of the dataset")
    pack.add_argument("target", type=Path, help="folder for shards and index")
    pack.add_argument("--split", required=True, help="which part of the dataset, e.g. train")
    pack.add_argument(
        "--shard-size", default="256MiB", help="samples (1000) or MiB (256MiB) of a shard; default %(default)s"
    )
    pack.add_argument("--seed", type=_at_least(0), default=0, help="seed of the order of samples; default %(default)s")
    pack.add_argument(
        "--workers", type=_at_least(1), default=os.cpu_count() or 1, help="processes; default all cores (%(default)s)"
    )
    pack.add_argument(
        "--dry-run", action="store_true", help="check the lists, say what would be written, write nothing"
    )
    index = command("index", _index, "Index shards that were made elsewhere in the same sample layout.")
    index.add_argument("source", type=Path, help="folder of the shards")
    for sub in (pack, index):
        for name, what in (("--crowd", "crowd segments"), ("--unlabelled", "pixels without a segment")):
            sub.add_argument(
                name,
                choices=("none", "ignore"),
                default="none",
                help=f"what {what} are in training: negatives (none, as in the paper) or outside the loss (ignore)",
            )
        sub.add_argument("--overwrite", action="store_true", help="replace shards and index that are there")
        sub.add_argument("--vocabulary", type=Path, required=sub is index, help="vocabulary file (JSON)")
    verify = command("verify", _verify, "Check checksums, decode every sample, check labels.")
    stats = command("stats", _stats, "Images, segments and pixels of each class.")
    stats.add_argument("--json", action="store_true", help="JSON instead of a table")
    preview = command("preview", _preview, "A sheet of samples with their segments in colour and named.")
    for sub in (verify, stats, preview):
        sub.add_argument("source", help="folder or url of a packed source")
    preview.add_argument("picture", type=Path, help="PNG to write")
    preview.add_argument("--count", type=_at_least(1), default=12, help="samples shown; default %(default)s")
    return parser


def _pack(options: argparse.Namespace) -> None:
    from data_tools.formats import FORMATS
    from data_tools.pack import PackOptions, is_finished, plan_pack, run_pack

    if options.format not in FORMATS:
        raise UserError(f"unknown format {options.format!r}", remedy=f"Known: {', '.join(FORMATS)}.")
    start = time.monotonic()
    known = FORMATS[options.format]
    vocabulary = _vocabulary(options.vocabulary or Path(__file__).parent / "vocabularies" / known.vocabulary)
    source = known.open_source(options.source, options.split, vocabulary)
    settings = PackOptions(
        options.format, options.split, options.shard_size, options.seed, options.crowd, options.unlabelled
    )
    packing = plan_pack(source, options.target, settings)
    print(
        f"{len(source.records)} samples, {len(packing.jobs)} shards, {len(vocabulary)} classes ({vocabulary.name}), "
        f"seed {options.seed}; in training, crowd becomes {options.crowd} and unlabelled becomes {options.unlabelled}"
    )
    if options.dry_run:
        print(f"dry run: nothing was written to {options.target}")
        return
    without = " without --overwrite" if options.overwrite else ""
    options.interrupted = f"; the same command{without} goes on where it stopped"
    with disk_faults(options.target):
        finished = is_finished(packing, overwrite=options.overwrite)
    if finished:
        print(f"{options.target} already holds exactly this pack: nothing to do")
        return
    head = run_pack(packing, workers=options.workers, progress=functools.partial(_bar, desc="packing"))
    size = sum(shard["size"] for shard in head["shards"])
    print(
        f"packed {head['samples']} samples, {size / (1 << 20):.1f} MiB, into {options.target} "
        f"in {time.monotonic() - start:.1f} s"
    )


def _index(options: argparse.Namespace) -> None:
    from data_tools.index import index_source
    from mf_scale.data.index import HEAD

    if (options.source / HEAD).exists() and not options.overwrite:
        raise UserError("there is an index already", where=str(options.source), remedy="Add --overwrite to replace it.")
    with disk_faults(options.source):
        head = index_source(
            options.source,
            _vocabulary(options.vocabulary),
            crowd=options.crowd,
            unlabelled=options.unlabelled,
            progress=functools.partial(_bar, desc="indexing", unit="shard"),
        )
    print(f"indexed {head['samples']} samples of {len(head['shards'])} shards in {options.source}")


def _verify(options: argparse.Namespace) -> None:
    from data_tools.verify import verify_source

    index = verify_source(options.source, progress=functools.partial(_bar, desc="verifying"))
    print(f"{options.source}: {len(index.shards)} shards and {index.samples} samples are sound")


def _stats(options: argparse.Namespace) -> None:
    from data_tools.stats import count_source, format_table

    counts = count_source(options.source, progress=functools.partial(_bar, desc="counting"))
    print(json.dumps(counts, ensure_ascii=False) if options.json else format_table(counts))


def _preview(options: argparse.Namespace) -> None:
    from data_tools.preview import draw_sheet

    with disk_faults(options.picture):
        shown = draw_sheet(options.source, options.picture, count=options.count)
    print(f"{options.picture}: {shown} samples of {options.source}")


def _vocabulary(path: Path) -> Any:
    from mf_scale.vocabulary import Vocabulary

    with disk_faults(path):
        return Vocabulary.load(path)


def _bar(iterable: Any = None, **settings: Any) -> Any:
    from tqdm import tqdm

    return tqdm(iterable, file=sys.stderr, mininterval=0.5, **settings)


if __name__ == "__main__":
    sys.exit(main())
