"""Verify: checksums of shards and columns, every sample decodes and is what the index says. Each byte is read once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from data_tools.files import CHUNK
from data_tools.parallel import each, tick
from data_tools.problems import Problems
from data_tools.source import Run, decoded, reader_of, sample_runs
from mf_scale.data.decode import StoredSample
from mf_scale.data.index import Index, checksum
from mf_scale.data.reader import SampleReader
from mf_scale.data.samples import BadSample
from mf_scale.data.storage import StorageError
from mf_scale.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    shard: str
    reason: str = ""
    key: str | None = None
    """Of the sample, where it is one."""
    sample: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        place = self.shard if self.key is None else f"{self.key} in {self.shard} at byte {self.offset}"
        return f"{place}: {self.reason}" if self.reason else place


@dataclass(frozen=True)
class Report:
    """What was found of a source."""

    source: str
    digest: str
    shards: int
    samples: int
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file: counts by kind, then every finding."""
        counts = Counter(finding.kind for finding in self.findings)
        found = [asdict(finding) for finding in self.findings]
        return {"sound": not found, **vars(self), "counts": dict(counts), "findings": found}

    def refuse(self) -> None:
        """UserError with the kinds, counts and first names, if anything was found."""
        problems = Problems()
        for finding in self.findings:
            problems.add(finding.kind, str(finding))
        bad = len({finding.sample for finding in self.findings} - {None})
        problems.refuse(
            f"{bad} of {self.samples} samples are not sound" if bad else "the source is not sound",
            where=self.source,
            remedy="Restore the shards or pack (or index) the source again; --json FILE lists all.",
        )


@dataclass(frozen=True)
class _Job:
    source: str
    digest: str
    shard: int
    runs: list[Run]


def verify_source(source: str, *, workers: int = 1, progress: Callable[..., Any]) -> Report:
    """Look at everything; raises UserError where the index itself cannot be opened, StorageError of the network."""
    index = Index.open(source)
    findings = _check_columns(index)
    if not findings:
        jobs = [_Job(source, index.digest, number, []) for number in range(len(index.shards))]
        for run in sample_runs(index):
            jobs[run.shard].runs.append(run)
        with (
            progress(total=index.samples, unit="sample") as bar,
            closing(each(_check_shard, jobs, workers=workers, bar=bar)) as results,
        ):
            findings = [finding for found in results for finding in found]
    return Report(source, index.digest, len(index.shards), index.samples, findings)


def _check_columns(index: Index) -> list[Finding]:
    """Where the columns are not those of the head, the rows are not worth following."""
    name = index.columns["name"]
    if checksum(index.storage, name, index.columns["size"]) != index.columns["sha256"]:
        return [Finding("columns of the index that were changed", name, "it has another checksum")]
    counts = pc.value_counts(index.table["key"])
    doubles = counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist()
    return [Finding("keys that stand twice in the index", name, key) for key in doubles]


def _check_shard(job: _Job) -> list[Finding]:
    """Read a shard from the first byte to the last: its checksum, and its samples on the way."""
    reader = reader_of(job.source, job.digest)
    shard, storage = reader.index.shards[job.shard], reader.index.storage
    try:
        size = storage.size(shard.name)
    except StorageError:
        raise  # the network's fault says nothing about the shard
    except UserError as error:
        tick(shard.samples)
        return [Finding("shards that are missing or cannot be read", shard.name, error.what)]
    findings = []
    if size != shard.size:
        findings.append(Finding("shards of another size", shard.name, f"{size} bytes instead of {shard.size}"))
    digest, at = hashlib.sha256(), 0
    for run in job.runs:
        parts, outside = _readable(reader, run, at, size)
        findings += [_of(reader, i, "samples that lie outside of their shard") for i in outside]
        tick(len(outside))
        for part in parts:
            start, stop = _bounds(reader, part)
            for data in _pieces(reader, shard.name, at, start):
                digest.update(data)
            data, at = storage.read(shard.name, start, stop - start), stop
            digest.update(data)
            findings += _check_run(reader, part, data, start)
    for data in _pieces(reader, shard.name, at, size):
        digest.update(data)
    if size == shard.size and digest.hexdigest() != shard.sha256:
        findings.append(Finding("shards with another checksum", shard.name))
    return findings


def _pieces(reader: SampleReader, name: str, start: int, end: int) -> Iterator[bytes]:
    for offset in range(start, end, CHUNK):
        yield reader.index.storage.read(name, offset, min(CHUNK, end - offset))


def _readable(reader: SampleReader, run: Run, at: int, size: int) -> tuple[list[Run], list[int]]:
    """Parts of a run whose samples follow one another between byte `at` and `size`, and the samples that do not."""
    parts: list[Run] = []
    outside = []
    for i in range(run.first, run.end):
        start, stop = _bounds(reader, Run(run.shard, i, i + 1))
        if not at <= start < stop <= size:
            outside.append(i)
            continue
        at = stop
        if parts and parts[-1].end == i:
            parts[-1] = Run(run.shard, parts[-1].first, i + 1)
        else:
            parts.append(Run(run.shard, i, i + 1))
    return parts, outside


def _bounds(reader: SampleReader, run: Run) -> tuple[int, int]:
    """First byte of a run and the one behind its last."""
    offset, size = reader.index.column("offset"), reader.index.column("size")
    return int(offset[run.first]), int(offset[run.end - 1] + size[run.end - 1])


def _check_run(reader: SampleReader, run: Run, data: bytes, start: int) -> Iterator[Finding]:
    for i, sample in decoded(reader, run, data, start):
        tick()
        if isinstance(sample, BadSample):
            yield _of(reader, i, "samples that do not decode", str(sample))
        elif not _as_described(reader.index, i, sample):
            yield _of(reader, i, "samples that the index describes wrongly")


def _as_described(index: Index, i: int, sample: StoredSample) -> bool:
    record = index.sample(i)
    return (
        sample.image.shape[:2] == (record.height, record.width)
        and sorted(set(sample.labels.tolist())) == record.class_ids
        and len(sample.labels) == record.segments
    )


def _of(reader: SampleReader, i: int, kind: str, reason: str = "") -> Finding:
    record = reader.index.sample(i)
    return Finding(kind, record.shard, reason, record.key, i, record.offset)
