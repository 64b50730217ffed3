"""Bench of an index and its order at scale: opening it, memory of a process, plans early and late, shares of ranks.

The peer holds what a map-style dataset holds: a list with a record of every sample, shuffled anew in every epoch. It is
measured at a size that memory can hold, beside ours at the same size.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mf_scale.bench.index_made import write_index
from mf_scale.bench.index_reading import LATE, Law, Reading, Task, read_list, read_ours
from mf_scale.errors import UserError
from mf_scale.rundir import disk_errors

THRESHOLD = 0.001
"""Of the repeat factors."""


@dataclass(frozen=True)
class Scale:
    """What is simulated; nothing of it but the index is made."""

    samples: int = 1_000_000
    classes: int = 1000
    global_batch: int = 512
    ranks: int = 8
    workers: int = 8
    """Of a rank."""
    peer_samples: int = 1_000_000
    """The most that the peer's list takes; a sample is 0.7 KiB of memory there."""


def bench_index(scale: Scale, *, folder: str | None = None, json_file: str | None = None) -> str:
    """Measure an index made up for the purpose; a table, and all numbers into `json_file`.

    Raises UserError for fewer samples than two global batches, a global batch that the ranks cannot share, an index
    that does not fit on the disk (of `folder`, or of the temporary files), and where a file cannot be written.
    """
    _refuse(scale)
    by_blocks, repeats = _law(scale, "blocks", 0.0), _law(scale, "blocks", THRESHOLD)
    readings: dict[str, Reading] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix="mf-scale-index-") as made:
        small, large, cache = Path(made, "small"), Path(made, "large"), Path(made, "cache")
        began = time.perf_counter()
        large.mkdir()
        size = write_index(large, scale.samples, scale.classes)
        written = time.perf_counter() - began
        for name, law in (("blocks", by_blocks), ("repeats", repeats), ("full", _law(scale, "full", 0.0))):
            task = Task(str(large), str(cache / name), law)
            readings[f"{name}, first start"] = _apart(read_ours, task)
            readings[f"{name}, later start"] = _apart(read_ours, task)
        full_repeats = Task(str(large), str(cache / "repeats"), _law(scale, "full", THRESHOLD))
        readings["full, repeats, later"] = _apart(read_ours, full_repeats)
        if scale.peer_samples < scale.samples:
            small.mkdir()
            write_index(small, scale.peer_samples, scale.classes)
            readings[f"blocks of {scale.peer_samples:,}"] = _apart(
                read_ours, Task(str(small), str(cache / "small"), by_blocks)
            )
        compared = small if small.exists() else large
        readings["list in memory"] = _apart(read_list, Task(str(compared), str(cache / "list"), by_blocks))
    if json_file:
        with disk_errors(Path(json_file)):
            found = {"scale": asdict(scale), "bytes": size, "readings": {n: asdict(r) for n, r in readings.items()}}
            Path(json_file).write_text(json.dumps(found, indent=1) + "\n")
    return _table(scale, size, written, readings)


def _refuse(scale: Scale) -> None:
    if scale.samples < 2 * scale.global_batch or scale.peer_samples < 2 * scale.global_batch:
        raise UserError(
            f"{min(scale.samples, scale.peer_samples)} samples are too few for a global batch of {scale.global_batch}",
            remedy=f"Take --samples and --peer-samples of {2 * scale.global_batch} or more.",
        )
    if scale.global_batch % scale.ranks:
        raise UserError(
            f"{scale.ranks} ranks cannot share a global batch of {scale.global_batch}",
            remedy="Take --global-batch a multiple of --ranks.",
        )


def _law(scale: Scale, shuffle: str, threshold: float) -> Law:
    return Law(shuffle, threshold, scale.global_batch, scale.ranks, scale.workers)


def _apart(read: Callable[[Task], Reading], task: Task) -> Reading:
    """In a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(read, task).result()


_TITLES = {
    "open_s": "opens s",
    "order_s": "order s",
    "first_plan_ms": "plan ms",
    "first_plan_cpu_ms": "CPU ms",
    "late_plan_ms": "late ms",
    "late_plan_cpu_ms": "CPU ms",
    "turn_ms": "turn ms",
    "next_plan_ms": "next ms",
    "next_plan_cpu_ms": "CPU ms",
    "rank_ms": "rank ms",
    "worker_ms": "worker ms",
    "private_mib": "own MiB",
    "peak_mib": "peak MiB",
    "worker_mib": "worker's",
}


def _table(scale: Scale, size: int, written: float, readings: dict[str, Reading]) -> str:
    titles = "".join(f"{title:>10}" for title in _TITLES.values())
    lines = [
        f"index of {scale.samples:,} samples, {scale.classes:,} classes: {size / 1e9:.2f} GB, made in {written:.0f} s",
        f"global batch {scale.global_batch}, {scale.ranks} ranks of {scale.workers} workers simulated: their shares "
        f"are the plan; repeat threshold {THRESHOLD}; a process each; the late step is {LATE:,}",
        f"{'':22}{titles}",
    ]
    names = [field.name for field in fields(Reading) if field.name in _TITLES]
    for name, reading in readings.items():
        lines.append(f"{name:22}" + "".join(f"{_shown(getattr(reading, n)):>10}" for n in names))
    peer = readings["list in memory"]
    ours = next(r for r in readings.values() if r.samples == peer.samples)
    lines.append(
        f"blocks against the list at {peer.samples:,}: opens {peer.open_s / ours.open_s:.0f}x faster in "
        f"1/{peer.private_mib / max(ours.private_mib, 0.1):.0f} of the memory (the list's late plan is computed: "
        f"its first one times the epochs before); at {scale.samples:,} the list would take "
        f"{peer.private_mib / peer.samples * scale.samples / 1024:.0f} GiB (computed)"
    )
    return "\n".join(lines)


def _shown(number: float) -> str:
    return f"{number:.0f}" if number >= 1000 else f"{number:.1f}" if number >= 10 else f"{number:.3f}"
