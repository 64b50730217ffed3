"""Parallel: a function over jobs, in processes, under a bar that moves by what the function ticks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mf_scale.errors import FaultError

POLL = 0.2
"""Seconds between two looks at what the processes have done."""

Job = TypeVar("Job")
Result = TypeVar("Result")
_ticked: Callable[[int], object] = int
"""Takes what this process ticks; nothing is counted outside of `each`."""


def tick(amount: int = 1) -> None:
    """Called by a job's function: so much more is done. Raises KeyboardInterrupt where the work was called off."""
    _ticked(amount)


def each(act: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, bar: Any) -> Generator[Result, None, None]:
    """`act` of each job, in order, by `workers` processes; `bar.update` hears every tick.

    An error of a job is raised in its turn, and the others stop at their next tick, as they do where this is closed.
    Raises FaultError where a process was killed. Jobs, results and `act` (a plain function) travel pickled.
    """
    if workers <= 1 or len(jobs) <= 1:
        yield from _one_by_one(act, jobs, bar)
        return
    stop, done = multiprocessing.RawValue("b", 0), multiprocessing.Value("q", 0)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), initializer=_enter, initargs=(os.getpid(), stop, done))
    try:
        yield from _in_order(deque(pool.submit(act, job) for job in jobs), done, bar)
    except BrokenProcessPool as error:
        raise FaultError(
            "a process of this command was killed, perhaps for want of memory",
            remedy="Run the same command again; with fewer --workers if memory was short.",
        ) from error
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


def _one_by_one(act: Callable[[Job], Result], jobs: Sequence[Job], bar: Any) -> Generator[Result, None, None]:
    global _ticked  # noqa: PLW0603 - as in a pool's process, which is handed nothing else
    _ticked = bar.update
    try:
        yield from map(act, jobs)
    finally:
        _ticked = int


def _in_order(waiting: deque[Future[Result]], done: Any, bar: Any) -> Generator[Result, None, None]:
    shown = 0
    while waiting:
        wait([waiting[0]], timeout=POLL)
        bar.update(done.value - shown)
        shown = done.value
        if waiting[0].done():
            yield waiting.popleft().result()
    bar.update(done.value - shown)


def _enter(parent: int, stop: Any, done: Any) -> None:
    """Set up a pool's process: Ctrl-C is its parent's to hear, and it ends soon after its parent was killed."""
    global _ticked  # noqa: PLW0603 - a pool hands its processes nothing else
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def count(amount: int) -> None:
        if stop.value:
            raise KeyboardInterrupt
        with done.get_lock():
            done.value += amount

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    _ticked = count
    threading.Thread(target=watch, daemon=True).start()
