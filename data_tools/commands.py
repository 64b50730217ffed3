"""What each command does: options -> calls -> lines on stdout."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.problems import disk_faults
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

if TYPE_CHECKING:
    from data_tools.pack import Packing
    from data_tools.record import FormatSource
    from mf_scale.data.ids import LabelMember

MIB = 1 << 20


def pack(options: argparse.Namespace) -> None:
    """Open the dataset, plan, check ids, and write shards and index."""
    from data_tools.pack import PackOptions, plan_pack, run_pack
    from data_tools.target import look_at, prepare, refuse_other

    if options.overwrite and options.part[1] > 1:
        raise UserError(
            "--overwrite would remove what other parts have written", remedy="Remove the folder before the parts start."
        )
    start = time.monotonic()
    source = _open_dataset(options)
    names = ("format", "split", "shard_size", "seed", "crowd", "unlabelled")
    packing = plan_pack(source, options.target, PackOptions(*(getattr(options, name) for name in names)))
    _say(
        f"{len(source.records)} samples, {packing.image_bytes / MIB:.1f} MiB of images, {len(packing.jobs)} shards, "
        f"{len(source.vocabulary)} classes ({source.vocabulary.name}, {source.kind}), seed {options.seed}; "
        f"in training, crowd becomes {options.crowd} and unlabelled becomes {options.unlabelled}"
    )
    _tell_notes("the lists", source.notes)
    if options.dry_run:
        _check_ids(source, options)
        _try(packing, options)
        return
    with disk_faults(options.target):
        look = look_at(options.target, packing.plan)
        if look.state == "other" and not options.overwrite:
            refuse_other(options.target, packing.plan)
    if look.state == "finished" and not options.overwrite:
        _say(f"{options.target} already holds exactly this pack: nothing to do")
        return
    _check_ids(source, options)  # before anything is touched: what it refuses leaves the folder as it was
    if look.state == "damaged":
        _say(f"this pack was finished in {options.target} and is no longer whole: {look.told}; it is packed again")
    with disk_faults(options.target):
        prepare(options.target, packing.plan, overwrite=options.overwrite)
    without = " without --overwrite" if options.overwrite else ""
    options.interrupted = f"; the same command{without} goes on where it stopped"
    packed = run_pack(packing, workers=options.workers, part=options.part, progress=_bars("packing"))
    if options.part[1] > 1:
        _tell_part(packing, options.part)
    if packed is None:
        return
    _tell_notes("the annotations", packed.notes)
    size = sum(shard["size"] for shard in packed.head["shards"])
    _say(
        f"packed {packed.head['samples']} samples, {size / MIB:.1f} MiB, into {options.target} "
        f"in {time.monotonic() - start:.1f} s"
    )


def index(options: argparse.Namespace) -> None:
    """Index the shards of a folder."""
    from data_tools.histogram import format_report
    from data_tools.index import Meaning, index_source
    from mf_scale.data.index import HEAD

    if (options.source / HEAD).exists() and not options.overwrite:
        raise UserError("there is an index already", where=str(options.source), remedy="Add --overwrite to replace it.")
    labels = _labels(options)
    kind = options.kind or ("semantic" if labels else "panoptic")
    if labels and kind != "semantic":
        raise UserError(
            f"samples with one map of values cannot be {kind}", remedy="Such a map tells classes apart: semantic."
        )
    vocabulary = _vocabulary(options.vocabulary)
    with disk_faults(options.source):
        head, report = index_source(
            options.source,
            vocabulary,
            Meaning(options.crowd, options.unlabelled, kind, labels),
            accept=options.accept_ids,
            workers=options.workers,
            progress=_bars("indexing"),
        )
    if report is not None:
        _say(format_report(report, vocabulary))
    _say(f"indexed {head['samples']} samples ({kind}) of {len(head['shards'])} shards in {options.source}")


def verify(options: argparse.Namespace) -> None:
    """Look at every byte of a source and tell all that is wrong with it."""
    from data_tools.verify import verify_source

    _can_write(options.json)
    report = verify_source(options.source, workers=options.workers, progress=_bars("verifying"))
    _write_json(options.json, report.to_dict())
    report.refuse()
    _say(f"{options.source}: {report.shards} shards and {report.samples} samples are sound")


def stats(options: argparse.Namespace) -> None:
    """Count, print a table, write JSON and picture where they are asked for."""
    from data_tools.stats import count_source, format_table

    _can_write(options.json)
    _can_write(options.picture, ".png")
    seen = None if options.vocabulary is None else Vocabulary.load(options.vocabulary)
    counts = count_source(options.source, workers=options.workers, progress=_bars("counting"), vocabulary=seen)
    _say(format_table(counts))
    _write_json(options.json, counts)
    if options.picture is not None:
        from data_tools.stats_picture import draw_counts

        with disk_faults(options.picture):
            draw_counts(counts, options.picture)


def preview(options: argparse.Namespace) -> None:
    """Draw a contact sheet."""
    from data_tools.preview import draw_sheet

    _can_write(options.picture, ".png")
    with disk_faults(options.picture):
        shown = draw_sheet(options.source, options.picture, count=options.count)
    _say(f"{options.picture}: {shown} samples of {options.source}")


def _open_dataset(options: argparse.Namespace) -> FormatSource:
    from data_tools.formats import FORMATS

    if options.format not in FORMATS:
        raise UserError(f"unknown format {options.format!r}", remedy=f"Known: {', '.join(FORMATS)}.")
    known = FORMATS[options.format]
    path = options.vocabulary
    if path is None and known.vocabulary is not None:
        path = Path(__file__).parent / "vocabularies" / known.vocabulary
    return known.open_source(options.source, options.split, None if path is None else _vocabulary(path))


def _check_ids(source: FormatSource, options: argparse.Namespace) -> None:
    """Hold the values of label maps against their declared meaning, where the format has such."""
    from data_tools.histogram import check_ids, format_report

    if source.ids is not None:
        report = check_ids(
            source,
            workers=options.workers,
            most=options.check_maps,
            accept=options.accept_ids,
            progress=_bars("checking ids"),
        )
        _say(format_report(report, source.vocabulary))


def _try(packing: Packing, options: argparse.Namespace) -> None:
    from data_tools.dry_run import try_samples

    trial = try_samples(packing, most=options.check_maps, workers=options.workers, progress=_bars("trying"))
    about = "" if trial.samples == trial.total else "about "
    segments = round(trial.segments / trial.samples * trial.total)
    _say(
        f"tried {trial.samples} of {trial.total} samples: {about}{segments} segments "
        f"({trial.segments / trial.samples:.1f} a sample, {trial.crowd} of {trial.segments} crowd), "
        f"{len(trial.labels)} classes seen; shards of {about}{trial.bytes_of(packing) / MIB:.1f} MiB in all"
    )
    _tell_notes("the annotations", trial.notes)
    _say(f"dry run: nothing was written to {options.target}")


def _labels(options: argparse.Namespace) -> LabelMember | None:
    """The meaning of label maps: from the command line where it is told there, else from the vocabulary file."""
    from mf_scale.data.ids import IdMeaning, LabelMember

    told = {name: value for name in ("ignore", "background", "offset") if (value := getattr(options, name)) is not None}
    if options.labels is None:
        if told:
            raise UserError(f"--{next(iter(told))} says what values of label maps mean", remedy="Name them: --labels.")
        return None
    with disk_faults(options.vocabulary):
        Vocabulary.load(options.vocabulary)
        data = json.loads(options.vocabulary.read_text(encoding="utf-8"))
    ids = {**data.get("ids", {}), **told}
    return LabelMember(options.labels.lstrip("."), IdMeaning.from_dict(ids, where=str(options.vocabulary)))


def _tell_part(packing: Packing, part: tuple[int, int]) -> None:
    from data_tools.pack import missing_shards

    others = missing_shards(packing)
    parts = ", ".join(map(str, sorted({number % part[1] for number in others})))
    left = f"{len(others)} of its shards, of parts {parts}, are still to come: who ends last writes the index"
    _say(f"part {part[0]} of {part[1]} of this pack is done; {left if others else 'it was the last'}")


def _tell_notes(where: str, notes: dict[str, int]) -> None:
    if notes:
        _say(f"of {where}: " + ", ".join(f"{kind}: {number}" for kind, number in sorted(notes.items())))


def _can_write(path: Path | None, suffix: str = "") -> None:
    """Told before the work, which may take hours, and not after it."""
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise UserError("the picture is a PNG", where=str(path), remedy=f"Give a name that ends in {suffix}.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError("no file can be written here", where=str(path), remedy="Name a file in a folder that exists.")


def _write_json(path: Path | None, data: Any) -> None:
    if path is not None:
        with disk_faults(path):
            text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
            path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair, as JSON has it


def _vocabulary(path: Path) -> Vocabulary:
    with disk_faults(path):
        return Vocabulary.load(path)


def _say(text: str) -> None:
    """A line on stdout. Where its reader has left (`stats SRC | head`), the work goes on and nobody is told."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _bars(what: str) -> Any:
    """Opens a progress bar on stderr."""
    from tqdm import tqdm

    return functools.partial(tqdm, desc=what, file=sys.stderr, mininterval=0.5)
