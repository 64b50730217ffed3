"""Means over a logging interval, of the values that steps brought to the host."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.losses.terms import StepLoss
from mf_scale.training.memory import host_memory, take_device_peak
from mf_scale.training.phases import PHASES, StepTimes
from mf_scale.training.step import StepValues


class Meter:
    """Collects what steps did since the last reading."""

    def __init__(self, criterion: StepLoss, world: World, device: torch.device) -> None:
        self._names, self._counted = criterion.names, criterion.counted
        self._world, self._device = world, device
        self._reset()

    def add(self, values: StepValues, counts: list[int], samples: int, data_wait: float, times: StepTimes) -> None:
        """One step of `samples` samples that waited `data_wait` seconds for its data.

        The loss of a step without an update is left out of the mean: one that is not finite would hide all others.
        """
        if values.applied:
            self._losses += np.sum(values.terms, axis=0)
            for name, layers in values.layers.items():
                self._layers[name] = self._layers.get(name, 0.0) + np.array(layers)
            self._applied += 1
        self._counts += counts
        self._phases += [times.phases[phase] for phase in PHASES]
        self._elapsed += times.seconds
        self._steps += 1
        self._samples += samples
        self._wait += data_wait

    @property
    def steps(self) -> int:
        """Steps since the last reading, the same on every rank."""
        return self._steps

    def read(self) -> dict[str, Any]:
        """Means of the interval over steps and ranks, then start anew. All ranks call it."""
        elapsed, steps, size = self._elapsed, max(1, self._steps), self._world.size
        # Of memory the largest rank's counts: each rank has places of its own in the sum.
        memory = np.zeros((size, 2))
        memory[self._world.rank] = take_device_peak(self._device), host_memory()
        parts = [self._losses, self._counts, self._phases, memory.ravel(), *self._layers.values()]
        sums = comm.sum_array(np.concatenate(parts))
        losses, counts, phases, memory, *layers = np.split(sums, np.cumsum([len(part) for part in parts])[:-1])
        # NaN, written as null, where no step had an update.
        losses = (losses / (self._applied or math.nan)).tolist()
        peaks = memory.reshape(size, 2).max(axis=0).tolist()
        values = {
            "loss": sum(losses),
            **dict(zip((f"loss_{name}" for name in self._names), losses, strict=True)),
            **dict(zip(self._counted, (counts / steps).tolist(), strict=True)),
            "skipped": self._steps - self._applied,
            "images_per_second": self._samples / max(elapsed, 1e-9),
            "step_time": elapsed / steps,
            "data_wait": self._wait / steps,
            "phases": _filled(phases / (steps * size), elapsed / steps),
            "memory": {"device_peak_gib": peaks[0] or None, "host_rss_gib": peaks[1] or None},
        }
        if layers:
            means = [(part / self._applied).tolist() for part in layers]
            values["loss_layers"] = dict(zip(self._layers, means, strict=True))
        self._reset()
        return values

    def _reset(self) -> None:
        self._losses, self._counts = np.zeros(len(self._names)), np.zeros(len(self._counted))
        self._phases = np.zeros(len(PHASES))
        self._layers: dict[str, Any] = {}
        self._steps = self._applied = self._samples = 0
        self._wait = self._elapsed = 0.0


def _filled(seconds: np.ndarray, step: float) -> dict[str, float]:
    """Mean seconds by phase, with what of the step none of them was measured for in `other`."""
    phases = dict(zip(PHASES, seconds.tolist(), strict=True))
    return {**phases, "other": max(0.0, step - sum(phases.values()) + phases["other"])}
