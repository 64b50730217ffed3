"""Work done ahead in threads, in order and in bounded memory: decoding and encoding images leave Python's lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from queue import Empty, Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")
POLL = 0.2
"""Seconds between two looks whether the work was called off."""


def ahead(
    pool: Executor, jobs: Iterable[Callable[[], Sequence[T]]], most: int, weigh: Callable[[T], int], budget: int
) -> Iterator[T]:
    """The results of `jobs`, in order; at most `most` of them under way or waiting.

    No new one begins while what waits weighs `budget` bytes. An error of a job is raised in its turn.
    """
    waiting: deque[Future[Sequence[T]]] = deque()
    coming = iter(jobs)
    try:
        while True:
            while len(waiting) < most and (not waiting or _weight(waiting, weigh) < budget):
                job = next(coming, None)
                if job is None:
                    break
                waiting.append(pool.submit(job))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _weight(waiting: Iterable[Future[Sequence[T]]], weigh: Callable[[T], int]) -> int:
    done = (future for future in waiting if future.done() and not future.cancelled() and future.exception() is None)
    return sum(weigh(item) for future in done for item in future.result())


def in_background(items: Iterator[T], depth: int, stop: Callable[[], bool]) -> Generator[T, None, None]:
    """`items` made by one thread, `depth` of them ahead. Ends early once `stop()`; its errors are raised here."""
    queue: Queue[tuple[str, Any]] = Queue(depth)
    called_off = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not called_off.is_set():
            try:
                queue.put((kind, value), timeout=POLL)
            except Full:
                continue
            return

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if called_off.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=make, name="mf-predict-read", daemon=True)
    thread.start()
    try:
        while not stop():
            try:
                kind, value = queue.get(timeout=POLL)
            except Empty:
                continue
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        called_off.set()
