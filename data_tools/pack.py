"""Pack: a dataset in some format -> shards and their index, in a seeded order.

The same input and arguments give the same bytes. Shards and index appear under their names only when they are
whole, the index last; so a pack that was killed is never taken for a finished one, and running it again
keeps the shards that were finished.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.encode import encode_sample
from data_tools.index import ShardScan, publish, scan_shard, write_index, write_json
from data_tools.problems import Problems, disk_faults
from data_tools.record import Annotation, BadRecord, FormatSource, Record
from mf_scale.data.index import COLUMNS, HEAD
from mf_scale.errors import UserError

PLAN = "pack.json"
MIB = 1 << 20
OVERHEAD = 8192
"""Bytes a sample takes beside its image, roughly: map, json, tar headers."""
SHARD_NAME = re.compile(r"[\w.-]+-\d{6}\.tar")
_stop: Any = None
"""In a pool's process: shared with its parent, not 0 where the pack ended early."""


@dataclass(frozen=True)
class PackOptions:
    """What determines the bytes of a pack, beside the input."""

    format: str
    split: str
    shard_size: str
    """Samples ("1000") or MiB of images ("256MiB") of a shard."""
    seed: int
    crowd: str
    unlabelled: str


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    path: Path
    records: list[Record]
    annotate: Callable[[Record], Annotation]
    num_classes: int


@dataclass(frozen=True)
class Packing:
    """The shards a pack consists of, and what identifies it."""

    folder: Path
    source: FormatSource
    options: PackOptions
    jobs: list[ShardJob]
    plan: dict[str, Any]


def plan_pack(source: FormatSource, folder: Path, options: PackOptions) -> Packing:
    """Order the samples by the seed and cut them into shards; writes nothing."""
    if not source.records:
        raise UserError(f"split {options.split!r} has no annotated image", remedy="Check --split.")
    by_key = sorted(source.records, key=lambda record: record.key)
    order = np.random.Generator(np.random.PCG64(options.seed)).permutation(len(by_key))
    groups = list(_groups([by_key[i] for i in order], options.shard_size))
    jobs = [
        ShardJob(folder / f"{options.split}-{number:06d}.tar", group, source.annotate, len(source.vocabulary))
        for number, group in enumerate(groups)
    ]
    files = [[r.image.name, r.image.stat().st_size] for r in by_key]
    identity = {"options": asdict(options), "annotations": source.fingerprint, "vocabulary": source.vocabulary.digest}
    text = json.dumps([identity, files], sort_keys=True)
    return Packing(folder, source, options, jobs, {**identity, "plan": hashlib.sha256(text.encode()).hexdigest()})


def is_finished(packing: Packing, *, overwrite: bool) -> bool:
    """True where exactly this pack lies finished in the folder. Makes the folder ready otherwise.

    UserError where the folder holds something else and `overwrite` is not set.
    """
    folder = packing.folder
    if overwrite:
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(p.name for p in folder.iterdir())
    if not found:
        write_json(folder / PLAN, packing.plan)
        return False
    try:
        same = json.loads((folder / PLAN).read_text(encoding="utf-8")) == packing.plan
    except (FileNotFoundError, ValueError):
        same = False
    if not same:
        raise UserError(
            "the folder holds something else than this pack, or one with other arguments or input: "
            f"{', '.join(found[:4])}{', …' if len(found) > 4 else ''}",
            where=str(folder),
            remedy="Pack into another folder, or add --overwrite to replace shards and index here.",
        )
    return HEAD in found


def run_pack(packing: Packing, *, workers: int, progress: Callable[..., Any]) -> dict[str, Any]:
    """Write the missing shards with `workers` processes and then the index; returns its head.

    Raises UserError with everything that was wrong in the samples; no index is written then.
    """
    problems = Problems()
    scans: list[ShardScan] = []
    with (
        progress(total=sum(len(job.records) for job in packing.jobs), unit="sample") as bar,
        closing(_each_shard(packing.jobs, workers)) as shards,
    ):
        for job, (scan, found) in zip(packing.jobs, shards, strict=True):
            for kind, key in found:
                problems.add(kind, key)
            scans += [scan] if scan else []
            bar.update(len(job.records))
    problems.refuse(
        f"{len(problems)} samples cannot be packed",
        where=packing.options.split,
        remedy="Repair them or take them out of the lists, and pack again with --overwrite.",
    )
    with disk_faults(packing.folder):
        for left in packing.folder.glob("*.partial"):  # of processes that were killed
            left.unlink()
        return write_index(
            packing.folder,
            packing.source.vocabulary,
            scans,
            crowd=packing.options.crowd,
            unlabelled=packing.options.unlabelled,
            kind=packing.source.kind,
        )


def pack_shard(job: ShardJob) -> tuple[ShardScan | None, list[tuple[str, str]]]:
    """Write one shard if it is not there; what the index needs of it, or the faults (kind, key) of its samples."""
    from webdataset.writer import TarWriter

    if not job.path.exists():
        partial = job.path.with_name(f"{job.path.name}.{os.getpid()}.partial")
        faults: list[tuple[str, str]] = []
        with disk_faults(job.path.parent):
            with partial.open("wb") as file, TarWriter(file, encoder=False, user="", group="", mtime=0) as writer:
                for record in job.records:
                    if _stop is not None and _stop.value:
                        raise KeyboardInterrupt
                    try:
                        sample = encode_sample(record, job.annotate(record))
                    except BadRecord as bad:
                        faults.append((str(bad), record.key))
                        continue
                    if not faults:
                        writer.write(sample)
            if faults:
                partial.unlink()
                return None, faults
            publish(partial, job.path)
    return scan_shard(job.path, job.num_classes), []


def _each_shard(
    jobs: list[ShardJob], workers: int
) -> Generator[tuple[ShardScan | None, list[tuple[str, str]]], None, None]:
    """`pack_shard` of each job, in order; where this ends early, the processes stop at their next sample."""
    if workers <= 1 or len(jobs) == 1:
        yield from map(pack_shard, jobs)
        return
    stop = multiprocessing.RawValue("b", 0)
    with ProcessPoolExecutor(min(workers, len(jobs)), initializer=_enter, initargs=(os.getpid(), stop)) as pool:
        try:
            yield from pool.map(pack_shard, jobs)
        finally:
            stop.value = 1


def _enter(parent: int, stop: Any) -> None:
    """Set up a pool's process: Ctrl-C is its parent's to hear, and it ends soon after its parent was killed."""
    global _stop  # noqa: PLW0603 - a pool hands its processes nothing else
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _groups(records: Iterable[Record], shard_size: str) -> Iterator[list[Record]]:
    found = re.fullmatch(r"([1-9]\d*)(MiB)?", shard_size)
    if not found:
        raise UserError(f"shard size {shard_size!r} is not understood", remedy="Give samples (1000) or MiB (256MiB).")
    count, limit = (0, int(found[1]) * MIB) if found[2] else (int(found[1]), 0)
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        size += record.image.stat().st_size + OVERHEAD
        if len(group) == count or (limit and size >= limit):
            yield group
            group, size = [], 0
    if group:
        yield group


def _clear(folder: Path) -> None:
    """Remove a pack, the index first, so that at no moment an index speaks of shards that are gone."""
    for name in (HEAD, COLUMNS, PLAN):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("*"):
        if SHARD_NAME.fullmatch(path.name) or path.name.endswith(".partial"):
            path.unlink(missing_ok=True)
