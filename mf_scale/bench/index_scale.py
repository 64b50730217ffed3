"""Bench of an index and its order at scale: opening it, memory of a process, one step's plan, early and late in a run.

The peer holds what a map-style dataset holds: a list with a record of every sample, shuffled anew in every epoch.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mf_scale.data.index import COLUMNS, FORMAT, HEAD, SCHEMA, VERSION, Index, head_digest
from mf_scale.data.order import Stream, positions
from mf_scale.data.sources import order_of
from mf_scale.errors import UserError
from mf_scale.rundir import disk_errors

SHARD_SAMPLES = 1000
SAMPLE_BYTES = 200_000
GLOBAL_BATCH = 512
CLASSES = 1000
LATE = 1_000_000
"""The late step."""
MIB = 1 << 20


@dataclass(frozen=True)
class Reading:
    """What one way took in a process of its own."""

    open_s: float
    private_mib: float
    """Memory of its own after the plans, beyond that of the process before."""
    first_plan_ms: float
    """Sample ids of the first step, with all that has to be prepared for it."""
    late_plan_ms: float
    """The same in a fresh order, at the late step."""
    next_plan_ms: float
    """Of each of the next 20 steps, in the middle."""


def bench_index(samples: int, *, json_file: str | None) -> str:
    """Measure an index of `samples` made up for the purpose; a table, and all numbers into `json_file`.

    Raises UserError for fewer samples than two global batches, and where the file cannot be written.
    """
    if samples < 2 * GLOBAL_BATCH:
        raise UserError(f"{samples} samples are too few", remedy=f"Take --samples={2 * GLOBAL_BATCH} or more.")
    ways: dict[str, Callable[[str], Reading]] = {
        "blocks": _blocks,
        "blocks, repeats": _repeats,
        "full": _full,
        "list in memory": _listed,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), samples)
        spawn = multiprocessing.get_context("spawn")
        readings = {}
        for name, way in ways.items():
            with spawn.Pool(1) as pool:
                readings[name] = pool.apply(way, (folder,))
    if json_file:
        with disk_errors(Path(json_file)):
            Path(json_file).write_text(json.dumps({name: asdict(r) for name, r in readings.items()}, indent=1) + "\n")
    return _table(samples, readings)


def write_index(folder: Path, samples: int) -> None:
    """The two files of an index of `samples`, of shards that are not there: sizes and classes as a dataset has them."""
    generator = np.random.Generator(np.random.PCG64(0))
    shards = -(-samples // SHARD_SAMPLES)
    number = np.arange(samples)
    lists = np.concatenate([[0], np.cumsum(generator.integers(1, 12, samples))])
    columns = {
        "shard": number // SHARD_SAMPLES,
        "key": pa.array([f"{i:012d}" for i in range(samples)], pa.large_string()),
        "offset": number % SHARD_SAMPLES * SAMPLE_BYTES,
        "size": np.full(samples, SAMPLE_BYTES),
        "height": np.full(samples, 480),
        "width": np.full(samples, 640),
        "class_ids": pa.LargeListArray.from_arrays(
            pa.array(lists, pa.int64()), pa.array((CLASSES * generator.random(lists[-1]) ** 3).astype(np.int32))
        ),
        "segments": np.diff(lists),
    }
    table = pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)
    with pa.OSFile(str(folder / COLUMNS), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table.combine_chunks())
    counts = np.bincount(number // SHARD_SAMPLES, minlength=shards)
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "samples": samples,
        "crowd": "none",
        "unlabelled": "none",
        "kind": "panoptic",
        "labels": None,
        "columns": {"name": COLUMNS, "size": (folder / COLUMNS).stat().st_size, "sha256": ""},
        "shards": [
            {"name": f"made-{i:06d}.tar", "size": int(n) * SAMPLE_BYTES, "sha256": f"{i:064x}", "samples": int(n)}
            for i, n in enumerate(counts)
        ],
        "vocabulary": {
            "name": "made",
            "classes": [{"name": f"class {i}", "thing": True, "source_id": i} for i in range(CLASSES)],
        },
    }
    (folder / HEAD).write_text(json.dumps({**head, "digest": head_digest(head)}))


def private_mib() -> float:
    """Memory of this process's own, MiB (Linux): pages of mapped files are the kernel's, which all processes share."""
    fields = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return next(int(words[1]) for words in fields if words[0] == "Anonymous:") / 1024


def _blocks(folder: str) -> Reading:
    return _ours(folder, "blocks", 0.0)


def _repeats(folder: str) -> Reading:
    return _ours(folder, "blocks", 0.001)


def _full(folder: str) -> Reading:
    return _ours(folder, "full", 0.0)


def _ours(folder: str, shuffle: str, threshold: float) -> Reading:
    before = private_mib()
    began = time.perf_counter()
    index = Index.open(folder)
    opened = time.perf_counter() - began
    stream = Stream(0, index.digest, index.samples, index.samples, GLOBAL_BATCH, 0, 128, shuffle, threshold, 0, 0)
    if threshold:
        from mf_scale.data.repeat import repeat_factors

        length = repeat_factors(index, threshold, np.array([0, index.samples])).length
        stream = replace(stream, length=length)

    def plan(order: Any, step: int) -> float:
        start = time.perf_counter()
        order.sample_ids(positions(stream, step))
        return 1000 * (time.perf_counter() - start)

    def fresh_plan(step: int) -> float:
        start = time.perf_counter()
        order_of(index, stream).sample_ids(positions(stream, step))
        return 1000 * (time.perf_counter() - start)

    first, late = fresh_plan(0), fresh_plan(LATE)
    order = order_of(index, stream)
    plan(order, LATE)
    following = sorted(plan(order, LATE + 1 + i) for i in range(20))[10]
    return Reading(opened, private_mib() - before, first, late, following)


def _listed(folder: str) -> Reading:
    before = private_mib()
    began = time.perf_counter()
    index = Index.open(folder)
    columns = {name: index.table.column(name).to_pylist() for name in SCHEMA.names}
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    del columns
    opened = time.perf_counter() - began
    start = time.perf_counter()
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    batch = [records[i] for i in order[:GLOBAL_BATCH]]
    first = 1000 * (time.perf_counter() - start)
    start = time.perf_counter()
    batch = [records[i] for i in order[GLOBAL_BATCH : 2 * GLOBAL_BATCH]]
    following = 1000 * (time.perf_counter() - start)
    assert len(batch) == GLOBAL_BATCH
    # Its epoch's shuffle is drawn from where the generator stands, so a late step first draws all epochs before it.
    epochs = LATE * GLOBAL_BATCH // len(records)
    return Reading(opened, private_mib() - before, first, first * (epochs + 1), following)


def _table(samples: int, readings: dict[str, Reading]) -> str:
    lines = [
        f"index of {samples:,} samples, global batch {GLOBAL_BATCH}, a process each; the late step is {LATE:,}",
        f"{'':16} {'open s':>8} {'private MiB':>12} {'first plan ms':>14} {'late plan ms':>14} {'next plan ms':>13}",
    ]
    for name, r in readings.items():
        numbers = f"{r.open_s:8.3f} {r.private_mib:12.1f} {r.first_plan_ms:14.1f} {r.late_plan_ms:14.1f}"
        lines.append(f"{name:16} {numbers} {r.next_plan_ms:13.2f}")
    ours, peer = readings["blocks"], readings["list in memory"]
    lines.append(
        f"blocks against the list: opens {peer.open_s / ours.open_s:.0f}x faster in "
        f"1/{peer.private_mib / max(ours.private_mib, 0.1):.0f} of the memory (the list's late plan is computed: "
        "its first one times the epochs before)"
    )
    return "\n".join(lines)
