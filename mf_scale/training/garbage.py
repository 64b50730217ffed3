"""Python's garbage collector, held off the step: one rank that collects in the middle of one lets all others wait."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class Collector:
    """Collects at steps that are the same on every rank."""

    def __init__(self, every: int) -> None:
        """`every` in steps; 0: never, Python does."""
        self._every = every

    def collect_if_due(self, step: int) -> None:
        """Collect at multiples of `every`, what is young and what is old."""
        if self._every and step % self._every == 0:
            gc.collect()


@contextmanager
def held_off_the_step(every: int) -> Iterator[Collector]:
    """A block in which Python does not collect by itself, but every `every` steps; 0 leaves it to Python.

    What is alive at the start (modules, model, configuration) is taken out of the collections: of the demo's half a
    million objects each full one took 0.2 s to look through. Afterwards all is as it was.
    """
    if not every:
        yield Collector(0)
        return
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield Collector(every)
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
