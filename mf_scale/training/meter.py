"""Means over a logging interval, gathered without a host synchronisation in the step."""

from __future__ import annotations

import time
from typing import Any

import torch

from mf_scale.distributed import comm
from mf_scale.losses.terms import StepLoss
from mf_scale.training.step import StepResult


class Meter:
    """Collects what steps did since the last reading."""

    def __init__(self, device: torch.device, criterion: StepLoss) -> None:
        self._device = device
        self._names, self._counted = criterion.names, criterion.counted
        self._counts: list[int] = []
        self._reset()

    def add(self, result: StepResult, samples: int, data_wait: float) -> None:
        """One step of `samples` samples that waited `data_wait` seconds for its data."""
        self._terms += result.terms
        self._counts = [so_far + count for so_far, count in zip(self._counts, result.counts, strict=True)]
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
        own = torch.cat([self._terms.double().cpu(), torch.tensor(self._counts, dtype=torch.float64)])
        steps = max(1, self._steps)
        names = [*(f"loss_{name}" for name in self._names), *self._counted]
        means = dict(zip(names, (comm.sum_array(own.numpy()) / steps).tolist(), strict=True))
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
        self._terms = torch.zeros(len(self._names), device=self._device)
        self._counts = [0] * len(self._counted)
        self._steps = self._samples = 0
        self._wait = 0.0
        self._began = time.perf_counter()
