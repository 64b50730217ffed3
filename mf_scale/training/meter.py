"""Means over a logging interval, of the values that steps brought to the host."""

from __future__ import annotations

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
        """One step of `samples` samples that waited `data_wait` seconds for its data."""
        self._sums += [*np.sum(values.terms, axis=0), *counts]
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
        names = [*(f"loss_{name}" for name in self._names), *self._counted]
        means = dict(zip(names, (comm.sum_array(self._sums) / steps).tolist(), strict=True))
        values = {
            "loss": sum(means[f"loss_{name}"] for name in self._names),
            **means,
            "images_per_second": self._samples / max(elapsed, 1e-9),
            "step_time": elapsed / steps,
            "data_wait": self._wait / steps,
        }
        self._reset()
        return values

    def _reset(self) -> None:
        self._sums = np.zeros(len(self._names) + len(self._counted))
        self._steps = self._samples = 0
        self._wait = 0.0
        self._began = time.perf_counter()
