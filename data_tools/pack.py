"""Pack: a dataset in some format -> shards and their index, in a seeded order.

The same input and arguments give the same bytes, whatever the number of processes, parts and hosts. Shards and index
appear under their names only when they are whole, the index last; so a pack that was killed is never taken for a
finished one, and running it again keeps the shards that were finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.files import sweep_partials
from data_tools.index import Meaning, write_index
from data_tools.parallel import each
from data_tools.problems import Problems, disk_faults
from data_tools.record import FormatSource, Record
from data_tools.scan import ShardScan
from data_tools.shards import ShardJob, pack_shard, rows_of
from data_tools.sidecar import sidecar_path
from data_tools.target import refuse_other
from mf_scale.data.index import HEAD, VERSION
from mf_scale.errors import UserError

MIB = 1 << 20
OVERHEAD = 8192
"""Bytes a sample takes beside its image, roughly: map, json, tar headers."""
LOOKING = 16
"""Threads that ask for the sizes of images: on a parallel file system each question waits."""


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
class Packing:
    """The shards a pack consists of, and what identifies it."""

    folder: Path
    source: FormatSource
    options: PackOptions
    jobs: list[ShardJob]
    image_bytes: int
    plan: dict[str, Any]


@dataclass(frozen=True)
class Packed:
    """A finished pack."""

    head: dict[str, Any]
    notes: dict[str, int]
    """What the annotations had worth telling, by kind."""


def plan_pack(source: FormatSource, folder: Path, options: PackOptions) -> Packing:
    """Order the samples by the seed and cut them into shards; writes nothing."""
    if not source.records:
        raise UserError(f"split {options.split!r} has no annotated image", remedy="Check --split.")
    if not re.fullmatch(r"\w[\w.-]*", options.split, re.ASCII):
        raise UserError(
            f"shards cannot be named after split {options.split!r}", remedy="Use letters, digits, '_', '-' and '.'."
        )
    by_key = sorted(source.records, key=lambda record: record.key)
    with ThreadPoolExecutor(LOOKING) as threads:
        sizes = list(threads.map(lambda record: record.image.stat().st_size, by_key))
    order = np.random.Generator(np.random.PCG64(options.seed)).permutation(len(by_key))
    groups = list(_groups(((by_key[i], sizes[i]) for i in order), options.shard_size))
    files = [[record.image.name, size] for record, size in zip(by_key, sizes, strict=True)]
    identity: dict[str, Any] = {
        "version": VERSION,
        "options": asdict(options),
        "annotations": source.fingerprint,
        "vocabulary": _digest(source.vocabulary.to_dict()),
    }
    plan = {**identity, "plan": _digest([identity, files])}
    jobs = [
        ShardJob(
            folder / f"{options.split}-{number:06d}.tar", group, source.annotate, len(source.vocabulary), plan["plan"]
        )
        for number, group in enumerate(groups)
    ]
    return Packing(folder, source, options, jobs, sum(sizes), plan)


def run_pack(
    packing: Packing, *, workers: int, progress: Callable[..., Any], part: tuple[int, int] = (0, 1)
) -> Packed | None:
    """Write the missing shards of part i of n with `workers` processes, and the index where all parts have theirs.

    None where other parts are not done yet. Raises UserError with everything that was wrong in the samples; no index
    is written then.
    """
    with disk_faults(packing.folder):
        sweep_partials(packing.folder, finished=False)
        mine = packing.jobs[part[0] :: part[1]]
        missing = [job for job in mine if rows_of(job) is None]
    total, left = (sum(len(job.records) for job in jobs) for jobs in (mine, missing))
    problems = Problems()
    with (
        progress(total=total, initial=total - left, unit="sample") as bar,
        closing(each(pack_shard, missing, workers=workers, bar=bar)) as results,
    ):
        for result in results:
            if isinstance(result, Problems):
                problems.take(result)
    again = "into another folder" if part[1] > 1 else "again with --overwrite"
    problems.refuse(
        f"{len(problems)} samples cannot be packed",
        where=packing.options.split,
        remedy=f"Repair them or take them out of the lists, and pack {again}.",
    )
    with disk_faults(packing.folder):
        return finish_pack(packing)


def missing_shards(packing: Packing) -> list[int]:
    """Numbers of the shards that are not there yet."""
    found = {path.name for path in packing.folder.iterdir()}
    return [number for number, job in enumerate(packing.jobs) if job.path.name not in found]


def finish_pack(packing: Packing) -> Packed | None:
    """Write the index from the sidecars and remove these; None where a shard is missing.

    Two parts that finish at once both write it, the same bytes.
    """
    if missing_shards(packing):
        return None
    folder = packing.folder
    refuse_other(folder, packing.plan)
    notes: Counter[str] = Counter()
    scans: list[ShardScan] = []
    for job in packing.jobs:
        scan = rows_of(job)
        if scan is None and (folder / HEAD).exists():  # another part was faster and has removed them
            _tidy(packing)
            return Packed(json.loads((folder / HEAD).read_text(encoding="utf-8")), {})
        found = scan or pack_shard(job)
        if isinstance(found, Problems):
            raise found.error("the images changed since the pack began", where=str(folder), remedy="Pack again.")
        scans.append(found)
        notes.update(found.notes)
    meaning = Meaning(packing.options.crowd, packing.options.unlabelled, packing.source.kind)
    head = write_index(folder, packing.source.vocabulary, scans, meaning)
    _tidy(packing)
    return Packed(head, dict(notes))


def _tidy(packing: Packing) -> None:
    """Remove what only an unfinished pack needs. Each part does so, since it may have written after another did."""
    for job in packing.jobs:
        sidecar_path(job.path).unlink(missing_ok=True)
    sweep_partials(packing.folder, finished=True)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _groups(records: Iterable[tuple[Record, int]], shard_size: str) -> Iterator[list[Record]]:
    found = re.fullmatch(r"([1-9]\d*)(MiB)?", shard_size)
    if not found:
        raise UserError(f"shard size {shard_size!r} is not understood", remedy="Give samples (1000) or MiB (256MiB).")
    count, limit = (0, int(found[1]) * MIB) if found[2] else (int(found[1]), 0)
    group: list[Record] = []
    size = 0
    for record, image_bytes in records:
        group.append(record)
        size += image_bytes + OVERHEAD
        if len(group) == count or (limit and size >= limit):
            yield group
            group, size = [], 0
    if group:
        yield group
