"""Shards: write one shard of a pack with its sidecar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from webdataset.writer import TarWriter

from data_tools.encode import encode_sample
from data_tools.files import partial_path, publish
from data_tools.parallel import tick
from data_tools.problems import Problems, disk_faults
from data_tools.record import Annotation, BadRecord, Record
from data_tools.scan import ShardScan, scan_shard
from data_tools.sidecar import load_rows, of_another_plan, save_rows


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    path: Path
    records: list[Record]
    annotate: Callable[[Record], Annotation]
    num_classes: int
    plan: str
    """Digest of the pack it belongs to."""


def rows_of(job: ShardJob) -> ShardScan | None:
    """What was scanned of a finished shard, from its sidecar; None where it is not there or of other samples."""
    scan = load_rows(job.path, job.plan)
    return scan if scan is not None and _holds(scan, job) else None


def pack_shard(job: ShardJob) -> ShardScan | Problems:
    """Write a shard and its sidecar, the shard last; or, where it is there and sound, the sidecar alone.

    What the index needs of it, or the faults of its samples: then nothing is written. Ticks every sample.
    """
    with disk_faults(job.path.parent):
        if (scan := _kept(job)) is not None:
            _publish(scan, job)
            tick(len(job.records))
            return scan
        partial = partial_path(job.path)
        try:
            return _write(job, partial)
        finally:
            partial.unlink(missing_ok=True)


def _kept(job: ShardJob) -> ShardScan | None:
    """Scan of a shard that is there; None where it must be written: it is of another pack, damaged or cut."""
    if not job.path.exists() or of_another_plan(job.path, job.plan):
        return None
    scan = scan_shard(job.path, job.num_classes)
    return scan if isinstance(scan, ShardScan) and _holds(scan, job) else None


def _holds(scan: ShardScan, job: ShardJob) -> bool:
    """Whether a shard has exactly the samples it should have: one that was cut between two of them is a sound tar."""
    return scan.rows["key"].to_pylist() == [record.key for record in job.records]


def _write(job: ShardJob, partial: Path) -> ShardScan | Problems:
    problems = Problems()
    notes: Counter[str] = Counter()
    with partial.open("wb") as file, TarWriter(file, encoder=False, user="", group="", mtime=0) as writer:
        for record in job.records:
            tick()
            try:
                annotation = job.annotate(record)
                sample = encode_sample(record, annotation)
            except BadRecord as bad:
                problems.add(str(bad), record.key)
                continue
            notes.update(annotation.notes)
            if not problems:
                writer.write(sample)
    if problems:
        return problems
    scan = scan_shard(partial, job.num_classes, name=job.path.name)
    if isinstance(scan, Problems):
        return scan
    if not _holds(scan, job):
        problems.add("shards that do not read back as the samples written to them", job.path.name)
        return problems
    scan = replace(scan, notes=dict(notes))
    _publish(scan, job, partial)
    return scan


def _publish(scan: ShardScan, job: ShardJob, partial: Path | None = None) -> None:
    """Sidecar first, so that whoever finds a shard finds its sidecar too."""
    try:
        save_rows(scan, job.path, job.plan)
        if partial is not None:
            publish(partial, job.path)
    except FileNotFoundError:
        # Swept up by another process that has written the index: the shard is there, with the same bytes.
        if not job.path.exists():
            raise
