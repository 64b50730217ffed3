"""Limits of time: a file system or a network that does not answer must not keep the page from being printed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from mf_scale.errors import FaultError

T = TypeVar("T")


def within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """The result of `call`, or what it raises; FaultError where it takes longer than `seconds`.

    It runs in a thread of its own, which is left behind where it hangs: nothing ends a read of a server that is gone.
    """
    answer: list[T] = []
    failure: list[BaseException] = []

    def act() -> None:
        try:
            answer.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=act, daemon=True, name=what)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise FaultError(
            f"{what} did not answer within {seconds:g} s",
            remedy="Look at the file system or network that it lies behind (`df`, `mount`, the administrators).",
        )
    return answer[0]


class Watch:
    """The whole examination's time limit, and where it stands."""

    def __init__(self, seconds: float, overdue: Callable[[str], None], *, began: float | None = None) -> None:
        """`overdue` gets the present stage once the limit is over, in another thread. began: on the monotonic clock."""
        self.began = time.monotonic() if began is None else began
        self._stage = "the start"
        self._limit = seconds
        self._timer = threading.Timer(max(0.0, seconds - self.seconds), lambda: overdue(self._stage))
        self._timer.daemon = True
        self._timer.start()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return max(0.0, self._limit - self.seconds)

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """A block that is known by `stage`; the stage before holds again behind it."""
        before, self._stage = self._stage, stage
        try:
            yield
        finally:
            self._stage = before

    def end(self) -> None:
        """No limit any more."""
        self._timer.cancel()


def best_of(times: int, call: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
