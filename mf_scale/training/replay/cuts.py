"""How each step of a run was cut into micro-batches: every start may bring another number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mf_scale.config.schema import Config
from mf_scale.config.validate import plan_batch
from mf_scale.data.state import DataState
from mf_scale.rundir import MANIFEST, read_json


@dataclass(frozen=True)
class Cut:
    """Of the steps behind `after`, until a later cut begins before them."""

    after: int
    """Steps that the run had taken."""
    world: int
    micro_batch: int


def cut_of(cuts: Sequence[Cut], step: int) -> Cut:
    """The cut of step `step` (from 1); `cuts` are in the order in which the run was started, not in that of steps.

    A run that went back started again at an earlier step: its later start rules the steps from there on.
    """
    return next(cut for cut in reversed(cuts) if cut.after < step)


def read_cuts(
    starts: Sequence[dict[str, Any]], checkpoint: Path | None, base: int, data: DataState, config: Config
) -> tuple[Cut, ...]:
    """Cuts of every step behind `base`, from the `start` records of metrics.jsonl.

    Steps that none of them tells of are taken to be cut as by the ranks that wrote the checkpoint of `base` steps,
    whose data state is `data`; without one as by the first start. There must be one of the two.
    """
    told = tuple(Cut(s["step"], s["world"], s["micro_batch"]) for s in starts)
    if any(cut.after <= base for cut in told):
        return told
    if checkpoint is None:
        return (replace(told[0], after=base), *told)
    world = int(read_json(checkpoint / MANIFEST)["world"])
    as_then = replace(config, train=replace(config.train, global_batch=data.at(base).global_batch))
    return (Cut(base, world, plan_batch(as_then, world).micro_batch), *told)
