"""How long the phases of a step take on this rank: by the host's clock, on a GPU by events that are read a step late.

In synchronous training all ranks take as long as the slowest, since they wait for each other in the collectives. So
besides the whole, a rank's *own* seconds are kept: what passes until it enters a collective. The backward pass and the
update hold collectives at every ZeRO stage, the forward pass at stage 3 (weights are gathered), and waiting for the
step's agreement is no work either; all of that is left out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from mf_scale.distributed import comm

PHASES = ("data", "forward", "loss", "backward", "optimizer", "other")
"""data: waiting for the batch; loss: matching included; optimizer: collectives of the update included; other: all
else between two steps, the wait for other ranks included."""
OWN = ("data", "forward", "loss", "other")
"""Phases with seconds that are a rank's own."""
_BETWEEN = "between"


class _Mark(Protocol):
    def until(self, later: _Mark) -> float:
        """Seconds."""


@dataclass(frozen=True)
class _HostMark:
    at: float

    def until(self, later: _Mark) -> float:
        assert isinstance(later, _HostMark)
        return later.at - self.at


class _DeviceMark:
    """A moment of the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def until(self, later: _Mark) -> float:
        assert isinstance(later, _DeviceMark)
        return self._event.elapsed_time(later._event) / 1000  # milliseconds


@dataclass(frozen=True)
class StepMarks:
    """The marks of one step; to be read once the device has come so far."""

    marks: list[tuple[str, _Mark]]
    """What begins at each mark; the last one ends the step."""
    waited: float
    """Host seconds until the batch was there."""
    idle: float
    """Host seconds of this rank's own between the steps, the wait for the batch left out."""
    seconds: float
    """Host seconds since the step before."""
    gathers: bool
    """The forward pass waits for other ranks."""

    def read(self) -> StepTimes:
        """Does not wait for the device: the values that the step brought to the host came behind its last mark."""
        seconds = dict.fromkeys((*PHASES, _BETWEEN), 0.0)
        for (phase, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            seconds[phase] += begin.until(end)
        # A GPU that still works on the step before waits for neither batch nor host.
        between = seconds.pop(_BETWEEN)
        seconds["data"] += min(self.waited, between)
        rest = between - seconds["data"]
        seconds["other"] += rest
        own = {
            "data": seconds["data"],
            "forward": 0.0 if self.gathers else seconds["forward"],
            "loss": seconds["loss"],
            "other": min(self.idle, rest),
        }
        return StepTimes(self.seconds, seconds, own)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step on this rank."""

    seconds: float
    """By the host's clock, from the end of the step before; what came between (a save, a validation) left out."""
    phases: dict[str, float]
    """By `PHASES`."""
    own: dict[str, float]
    """By `OWN`."""


class Phases:
    """Marks where the phases of a session's steps begin."""

    def __init__(self, device: torch.device, *, gathers: bool) -> None:
        """`gathers`: the forward pass gathers weights from other ranks."""
        self._device, self._gathers = device, gathers
        self._marks: list[tuple[str, _Mark]] = []
        self._waited = self._idle = 0.0
        self.restart()

    def restart(self) -> None:
        """What has passed since the last step (a save, a validation) is no part of the next one."""
        self._marks = [(_BETWEEN, self._now())]
        self._ended, self._collectives = time.perf_counter(), comm.seconds_waited()

    def batch_there(self, waited: float) -> None:
        """This rank has its batch, for which it waited `waited` seconds, and turns to the others."""
        passed = time.perf_counter() - self._ended - (comm.seconds_waited() - self._collectives)
        self._waited, self._idle = waited, max(0.0, passed - waited)

    def enter(self, phase: str) -> None:
        """From here on the step is in `phase`, one of PHASES."""
        self._marks.append((phase, self._now()))

    def end(self) -> StepMarks:
        """The step's last work is under way."""
        last, now = self._now(), time.perf_counter()
        step = StepMarks([*self._marks, ("", last)], self._waited, self._idle, now - self._ended, self._gathers)
        self._marks, self._waited, self._idle = [(_BETWEEN, last)], 0.0, 0.0
        self._ended, self._collectives = now, comm.seconds_waited()
        return step

    def _now(self) -> _Mark:
        return _DeviceMark() if self._device.type == "cuda" else _HostMark(time.perf_counter())
