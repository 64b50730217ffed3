"""What an index and its order take in one process: time to open, of plans and shares, memory of its own."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from mf_scale.data.index import SCHEMA, Index
from mf_scale.data.order import SampleOrder, Stream, positions, rank_lanes, worker_share
from mf_scale.data.repeat import repeat_factors
from mf_scale.data.sources import order_of

LATE = 1_000_000
"""The late step."""
BLOCK = 128
_NEXT = 20
"""Steps behind the late one."""
_LOOK_SECONDS = 0.002


@dataclass(frozen=True)
class Law:
    """How the index is read, and by how many."""

    shuffle: str
    threshold: float
    global_batch: int
    ranks: int
    workers: int
    """Of a rank."""


@dataclass(frozen=True)
class Reading:
    """What one way took in a process of its own."""

    samples: int
    open_s: float
    order_s: float
    """What is made once a start: bounds of blocks, repeat factors."""
    first_plan_ms: float
    """Sample ids of the first global batch, with the epoch's order of blocks."""
    first_plan_cpu_ms: float
    """Of that, what the processor computed: no wait for a disk or for a core that others use."""
    late_plan_ms: float
    """The same in a fresh order, at the late step."""
    late_plan_cpu_ms: float
    turn_ms: float
    """Of that, the epoch's order of blocks: once an epoch, and at a start before the workers are forked."""
    next_plan_ms: float
    """Of each of the steps behind that, in the middle."""
    next_plan_cpu_ms: float
    """In the middle too."""
    rank_ms: float
    """Sample ids of one rank at a step, in the middle."""
    worker_ms: float
    """Of one worker of it."""
    private_mib: float
    """Memory of its own after the plans, beyond that of the process before."""
    peak_mib: float
    """The most on the way there."""
    worker_mib: float
    """Memory of its own of a forked worker, after its shares of two epochs."""


class Task(NamedTuple):
    """What a process of the bench is told."""

    folder: str
    cache: str
    """The user's cache for its time: nothing is kept there when the bench begins."""
    law: Law


class _Spent(NamedTuple):
    """Seconds by the clock and of them by the processor, in this thread."""

    wall: float
    cpu: float

    def plus(self, other: _Spent) -> _Spent:
        return _Spent(self.wall + other.wall, self.cpu + other.cpu)

    def minus(self, other: _Spent) -> _Spent:
        return _Spent(self.wall - other.wall, self.cpu - other.cpu)

    def times(self, count: int) -> _Spent:
        return _Spent(self.wall * count, self.cpu * count)


class _Times(NamedTuple):
    """Seconds of what a Reading has in ms."""

    first: _Spent
    late: _Spent
    turn: float
    following: _Spent
    rank: float
    worker: float

    def reading(self, samples: int, opened: float, ordered: float, mib: tuple[float, float, float]) -> Reading:
        first, late, following = (spent.times(1000) for spent in (self.first, self.late, self.following))
        turn, rank, worker = (1000 * seconds for seconds in (self.turn, self.rank, self.worker))
        return Reading(samples, opened, ordered, *first, *late, turn, *following, rank, worker, *mib)


def private_mib(pid: int | str = "self") -> float:
    """Memory of a process's own, MiB (Linux); pages of mapped files are the kernel's, which all processes share."""
    fields = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return next(int(words[1]) for words in fields if words[0] == "Private_Dirty:") / 1024


def read_ours(task: Task) -> Reading:
    """Our index and order."""
    os.environ["XDG_CACHE_HOME"] = task.cache
    law, before = task.law, private_mib()
    with _most_anonymous() as most:
        index, opened = _timed(lambda: Index.open(task.folder))
        stream, ordered = _timed(lambda: _stream(index, law))

        def plan(order: SampleOrder, step: int, lanes: Any = np.s_[:]) -> np.ndarray:
            return order.sample_ids(positions(stream, step)[lanes])

        first = _spent(partial(plan, order_of(index, stream), 0))
        order = order_of(index, stream)
        turn = _spent(partial(plan, order, LATE, [0]))
        late = turn.plus(_spent(partial(plan, order, LATE)))
        following = [_spent(partial(plan, order, LATE + 1 + i)) for i in range(_NEXT)]
        private = private_mib() - before
        by_rank, by_worker = _shares(law, stream, order, plan)
    workers_own = _in_a_worker(lambda: plan(order, LATE + stream.length // stream.count + 1, [0]))
    middle = _Spent(median(spent.wall for spent in following), median(spent.cpu for spent in following))
    times = _Times(first, late, turn.wall, middle, by_rank, by_worker)
    return times.reading(index.samples, opened, ordered, (private, most[0], workers_own))


def _stream(index: Index, law: Law) -> Stream:
    stream = Stream(
        0, index.digest, index.samples, index.samples, law.global_batch, 0, BLOCK, law.shuffle, law.threshold, 0, 0
    )
    if law.threshold:
        stream = replace(stream, length=repeat_factors(index, law.threshold, index.block_bounds(BLOCK)).length)
    order_of(index, stream)
    return stream


def _shares(law: Law, stream: Stream, order: SampleOrder, plan: Callable[..., np.ndarray]) -> tuple[float, float]:
    """Seconds of a rank's and of a worker's share at a step, in the middle of all; together they are the plan."""
    whole = plan(order, LATE)
    by_rank, by_worker, joined = [], [], np.full(law.global_batch, -1, np.int64)
    for rank in range(law.ranks):
        lanes = rank_lanes(law.global_batch, rank, law.ranks)
        of_rank, seconds = _timed(partial(plan, order, LATE, lanes))
        by_rank.append(seconds)
        parts = []
        for worker in range(law.workers):
            share = worker_share(lanes, worker, law.workers)
            if share.first:  # a worker that makes every so many steps whole: of this one, the first makes all
                continue
            part, seconds = _timed(partial(plan, order, LATE, share.lanes))
            by_worker.append(seconds)
            parts.append(part)
        if not np.array_equal(np.concatenate(parts), of_rank):
            raise AssertionError(f"the workers of rank {rank} do not make its share")
        joined[lanes] = of_rank
    if not np.array_equal(joined, whole):
        raise AssertionError("the ranks together do not make the plan")
    return median(by_rank), median(by_worker)


def _in_a_worker(act: Callable[[], Any]) -> float:
    """MiB of its own that a forked process has after `act`."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        act()
        send.send(private_mib())

    process = context.Process(target=run)
    process.start()
    send.close()
    found = float(receive.recv())
    process.join()
    return found


def read_list(task: Task) -> Reading:
    """The peer: a list with a record of every sample, as a map-style dataset holds it, shuffled in every epoch."""
    os.environ["XDG_CACHE_HOME"] = task.cache
    before, batch = private_mib(), task.law.global_batch
    with _most_anonymous() as most:
        records, opened = _timed(lambda: _records(task.folder))
        order = list(range(len(records)))

        def take(first: int, end: int) -> list[Any]:
            return [records[i] for i in order[first:end]]

        shuffled = _spent(lambda: random.Random(0).shuffle(order))
        first = shuffled.plus(_spent(lambda: take(0, batch)))
        following = _spent(lambda: take(batch, 2 * batch))
        by_rank = _timed(lambda: take(batch, batch + len(range(0, batch, task.law.ranks))))[1]
        private = private_mib() - before
    # Its epoch's shuffle is drawn from where the generator stands, so a late step first draws all epochs before it.
    late = first.times(LATE * batch // len(records) + 1)
    workers_own = _in_a_worker(lambda: [records[i] for i in order])
    times = _Times(first, late, late.minus(following).wall, following, by_rank, by_rank)
    return times.reading(len(records), opened, 0.0, (private, most[0], workers_own))


def _records(folder: str) -> list[dict[str, Any]]:
    index = Index.open(folder)
    columns = {name: index.table.column(name).to_pylist() for name in SCHEMA.names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    made = act()
    return made, time.perf_counter() - began


def _spent(act: Callable[[], Any]) -> _Spent:
    """Of this thread alone: the one that watches the memory meanwhile does not count."""
    wall, cpu = time.perf_counter(), time.thread_time()
    act()
    return _Spent(time.perf_counter() - wall, time.thread_time() - cpu)


@contextmanager
def _most_anonymous() -> Iterator[list[float]]:
    """A list of one: the most memory of its own that this process has had inside, beyond that before; MiB."""
    before, most, over = _anonymous_mib(), [0.0], threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            most[0] = max(most[0], _anonymous_mib() - before)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()
        most[0] = max(most[0], _anonymous_mib() - before)


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
