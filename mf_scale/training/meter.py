"""Means over a logging interval, of the values that steps brought to the host."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from mf_scale.distributed import comm
from mf_scale.losses.terms import StepLoss
from mf_scale.training.step import StepValues


class Meter:
    """Collects what steps did since the last reading."""

    def __init__(self, criterion: StepLoss) -> None:
        self._names, self._counted = criterion.names, criterion.counted
        self._reset()

    def add(self, values: StepValues, counts: list[int], samples: int, data_wait: float) -> None:
        """One step of `samples` samples that waited `data_wait` seconds for its data.

        The loss of a step without an update is left out of the mean: one that is not finite would hide all others.
        """
        if values.applied:
            self._sums[: len(self._names)] += np.sum(values.terms, axis=0)
            self._applied += 1
        self._sums[len(self._names) :] += counts
        self._steps += 1
        self._samples += samples
        self._wait += data_wait

    @property
    def steps(self) -> int:
        """Steps since the last reading, the same on every rank."""
        return self._steps

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (a checkpoint, a validation) out of the speed."""
        self._began += seconds

    def read(self) -> dict[str, Any]:
        """Means of the interval over steps and ranks, then start anew. All ranks call it."""
        elapsed = time.perf_counter() - self._began
        steps = max(1, self._steps)
        sums = comm.sum_array(self._sums)
        # NaN, written as null, where no step had an update.
        losses = (sums[: len(self._names)] / (self._applied or math.nan)).tolist()
        values = {
            "loss": sum(losses),
            **dict(zip((f"loss_{name}" for name in self._names), losses, strict=True)),
            **dict(zip(self._counted, (sums[len(self._names) :] / steps).tolist(), strict=True)),
            "skipped": self._steps - self._applied,
            "images_per_second": self._samples / max(elapsed, 1e-9),
            "step_time": elapsed / steps,
            "data_wait": self._wait / steps,
        }
        self._reset()
        return values

    def _reset(self) -> None:
        self._sums = np.zeros(len(self._names) + len(self._counted))
        self._steps = self._applied = self._samples = 0
        self._wait = 0.0
        self._began = time.perf_counter()
