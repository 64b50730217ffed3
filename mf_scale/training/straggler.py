"""Which rank the others wait for: each one's own seconds, compared every `train.straggler_every` steps."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mf_scale.config.schema import TrainConfig
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.training.phases import OWN, PHASES, StepTimes

LEAST_SHARE = 0.05
"""Of a step: what a rank costs the others below it is not worth a word, however many times slower it is."""
RANKS_TOLD = 16
"""Ranks that a line of metrics.jsonl lists, the slowest first: of few ranks all."""


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    phase: str
    """Of `OWN`: where most of it is lost."""
    seconds: float
    """Of this rank in this phase, a step."""
    median: float
    """Of the other ranks."""
    own: float
    """Of this rank in all phases of `OWN`."""
    own_median: float
    cost: float
    """Seconds that the others wait for it, a step."""


@dataclass(frozen=True)
class RankTimes:
    """Mean seconds a step of every rank, over `train.straggler_every` steps."""

    phases: NDArray[np.float64]
    """[ranks,PHASES]"""
    own: NDArray[np.float64]
    """[ranks,OWN]"""
    seconds: NDArray[np.float64]
    """[ranks]: a whole step."""

    def told(self) -> dict[str, Any]:
        """For metrics.jsonl: [least, median, most] of each phase, the RANKS_TOLD ranks with the most own seconds."""
        spread = np.quantile(self.phases, [0, 0.5, 1], axis=0).T.round(6).tolist()
        order = np.argsort(-self.own.sum(axis=1), kind="stable")[:RANKS_TOLD].tolist()
        named = self.phases.round(6).tolist()
        slowest = [
            {"rank": rank, "own": round(float(self.own[rank].sum()), 6), **dict(zip(PHASES, named[rank], strict=True))}
            for rank in order
        ]
        return {"phases": dict(zip(PHASES, spread, strict=True)), "slowest": slowest}


class Stragglers:
    """Adds up the seconds of this rank and compares them with the others'."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self._every = config.straggler_every if world.size > 1 else 0
        self._world = world
        self._warm = False
        self._reset()

    def _reset(self) -> None:
        self._sums, self._steps = np.zeros(len(PHASES) + len(OWN) + 1), 0

    def add(self, times: StepTimes, *, counts: bool = True) -> RankTimes | None:
        """Take a step; on all ranks together. After `straggler_every` of them the times of all ranks.

        The first step of a session, which compiles and probes, is left out, and those that do not `counts`.
        """
        if not self._warm or not counts or not self._every:
            self._warm = True
            return None
        own = (times.own[phase] for phase in OWN)
        self._sums += [*(times.phases[phase] for phase in PHASES), *own, times.seconds]
        self._steps += 1
        if self._steps < self._every:
            return None
        table = np.zeros((self._world.size, len(self._sums)))
        table[self._world.rank] = self._sums / self._steps
        self._reset()
        table = comm.sum_array(table)
        return RankTimes(table[:, : len(PHASES)], table[:, len(PHASES) : -1], table[:, -1])


def slowest(times: RankTimes, factor: float) -> Straggler | None:
    """The rank with the most own seconds; None where it matters not.

    It does from `factor` times the median of the other ranks on, and from LEAST_SHARE of the step.
    """
    own, step = times.own, float(np.median(times.seconds))
    totals = own.sum(axis=1)
    rank = int(totals.argmax())
    others = np.delete(own, rank, axis=0)
    median = float(np.median(others.sum(axis=1)))
    cost = float(totals[rank]) - median
    if totals[rank] < factor * median or cost < LEAST_SHARE * step:
        return None
    medians = np.median(others, axis=0)
    place = int((own[rank] - medians).argmax())
    seconds = float(own[rank, place]), float(medians[place])
    return Straggler(rank, OWN[place], *seconds, float(totals[rank]), median, cost)


def host_of(rank: int) -> str:
    """Name of the node of `rank`; on all ranks together."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return str(comm.broadcast_object((comm.gather_objects(name) or [""] * (rank + 1))[rank]))


def straggler_sentence(found: Straggler, host: str, first: int, last: int) -> str:
    """For the person at the console, of the steps `first` to `last`."""
    times = f"{found.own / found.own_median:.1f}x" if found.own_median > 0 else "many times"
    return (
        f"steps {first:,} to {last:,}: the others wait {found.cost:.3f} s a step for rank {found.rank} on {host}, "
        f"which needs {times} their time; most in {found.phase}: {found.seconds:.3f} s, the median of the others is "
        f"{found.median:.3f}"
    )
