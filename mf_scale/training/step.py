"""One step: k micro-batches, with the loss's normalisers counted over the whole step before the first forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mf_scale import faults
from mf_scale.config.validate import BatchPlan
from mf_scale.data.batch import Batch
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World
from mf_scale.distributed.gradients import StepOutcome
from mf_scale.losses.terms import LossTerms, StepLoss
from mf_scale.training.late import Late
from mf_scale.training.phases import Phases, StepMarks
from mf_scale.training.seeding import seed_model
from mf_scale.training.statistics import MovingStatistics
from mf_scale.training.transfer import Transfer


@dataclass(frozen=True)
class Agreement:
    """What all ranks know before a step's first forward, from one collective over the CPU."""

    normalisers: Any
    """What the loss divides by, made by `StepLoss.normalisers`."""
    stop: bool
    """Some rank was asked to stop."""
    save: bool
    """Rank 0's clock says that a checkpoint is due."""
    written: bool
    """Every rank has written its part of the checkpoint under way."""
    quarantined: int
    """Samples of this step that were replaced, all ranks."""
    failed: bool
    """Some rank cannot go on (it has no batch, or nowhere to write): all of them end here, nobody is left waiting."""
    loss: float
    """Loss over all ranks of the step whose share was brought along; NaN where there was none."""


def agree(
    batch: Batch | None,
    criterion: StepLoss,
    *,
    stop: bool,
    save: bool,
    written: bool,
    failed: bool,
    loss: float,
    world: World,
) -> Agreement:
    """Sum what the step needs over the ranks. Micro-batches are parts of `batch`, so its totals are theirs.

    `loss` is this rank's share of the loss of the last step whose outcome is known, or NaN.
    """
    bad, totals = 0, [0.0] * criterion.summed
    if batch is not None:
        bad = sum(event.get("event") == "quarantine" for event in batch.events)
        totals = [*criterion.totals(batch)]
    mine = np.array([stop, save, written, failed, bad, loss, *totals], dtype=np.float64)
    stops, saves, writes, fails, bad, loss, *totals = comm.sum_array(mine).tolist()
    return Agreement(
        criterion.normalisers(totals), bool(stops), bool(saves), writes == world.size, int(bad), bool(fails), loss
    )


@dataclass(frozen=True)
class StepResult:
    """What a step did on this rank; its values are on their way from the device."""

    step: int
    """Its number, from 1."""
    keys: list[list[str]]
    """Samples of each micro-batch."""
    counts: list[int]
    """By `StepLoss.counted`, of this rank."""
    replaced_costs: list[dict[str, object]]
    """Non-finite matching costs that were replaced."""
    terms: int
    """Loss terms of a micro-batch."""
    layers: dict[str, int]
    """By the name of a term, how many decoder layers it is known of."""
    values: Late
    """Terms of each micro-batch, those by layer, then applied, loss scale and the norms of the parameter groups."""
    marks: StepMarks
    """When its phases began."""

    def read(self) -> StepValues:
        """The values; waits where the device has not come that far."""
        values, behind = self.values.read(), self.terms * len(self.keys)
        terms = [values[i : i + self.terms] for i in range(0, behind, self.terms)]
        layers = {}
        for name, count in self.layers.items():
            layers[name], behind = values[behind : behind + count], behind + count
        applied, scale, *norms = values[behind:]
        return StepValues(terms, layers, bool(applied), scale, norms)


@dataclass(frozen=True)
class StepValues:
    """The numbers of a step on the host."""

    terms: list[list[float]]
    """This rank's share of the step's weighted loss terms: by micro-batch, then by `StepLoss.names`."""
    layers: dict[str, list[float]]
    """The same by the name of the term, then by decoder layer, where the loss can tell."""
    applied: bool
    """False where the step had no update, on any rank."""
    loss_scale: float
    group_norms: list[float]
    """L2 norm of each parameter group's gradient before clipping, the same on every rank."""

    @property
    def loss(self) -> float:
        """This rank's share of the step's loss."""
        return sum(sum(terms) for terms in self.terms)

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the gradient before clipping."""
        return sum(norm**2 for norm in self.group_norms) ** 0.5


def train_step(
    engine: Engine,
    criterion: StepLoss,
    batch: Batch,
    agreement: Agreement,
    *,
    transfer: Transfer,
    statistics: MovingStatistics,
    phases: Phases,
    plan: BatchPlan,
    world: World,
    seed: int,
    step: int,
    lr_factor: Callable[[], float],
) -> StepResult:
    """Train on this rank's share of global batch `step` (from 0).

    `lr_factor` is asked between the last backward pass and the update: what became of the step before is known by then.
    """
    terms: list[Tensor] = []
    layers: dict[str, Tensor] = {}
    counts, replaced, keys = [0] * len(criterion.counted), [], []
    outcome = None
    for number, micro in enumerate(transfer.micro_batches(batch, plan.micro_batch)):
        phases.enter("forward")
        seed_model(seed, step, lane=world.rank + world.size * number * plan.micro_batch)
        faults.reach("train.forward", rank=world.rank, step=step + 1)
        prediction = engine.forward(micro.images)
        phases.enter("loss")
        losses = criterion(prediction, micro, agreement.normalisers)
        del prediction  # its memory is the backward pass's
        losses = disturbed(losses, rank=world.rank, step=step + 1)
        phases.enter("backward")
        engine.backward(losses.total)
        terms.append(torch.stack([losses.terms[name] for name in criterion.names]))
        counts = [so_far + losses.counts[name] for so_far, name in zip(counts, criterion.counted, strict=True)]
        layers = {name: layers[name] + values if name in layers else values for name, values in losses.layers.items()}
        replaced += losses.nonfinite
        keys.append(micro.keys)
        if number + 1 < plan.accumulation:
            engine.end_micro_batch()
            phases.enter("other")  # the next micro-batch's copy
        else:
            phases.enter("optimizer")
            outcome = engine.step(lr_factor())
            statistics.end_step(outcome.applied)
    assert outcome is not None  # accumulation is at least 1
    marks = phases.end()
    sizes = {name: len(values) for name, values in layers.items()}
    values = Late(_flat([*terms, *layers.values()], outcome))
    return StepResult(step + 1, keys, counts, replaced, len(criterion.names), sizes, values, marks)


def _flat(terms: list[Tensor], outcome: StepOutcome) -> Tensor:
    """Everything the host wants to know of a step in one tensor, so in one copy."""
    last = torch.cat([outcome.applied.float().view(1), outcome.loss_scale.view(1), outcome.group_norms])
    return torch.cat([*terms, last]).float()


def disturbed(losses: LossTerms, *, rank: int, step: int) -> LossTerms:
    """The loss as it is, or, where a test ordered it here, with its total and first term NaN or a thousandfold."""
    ordered = [factor for action, factor in _DISTURBANCES if faults.is_ordered(action, "loss", rank=rank, step=step)]
    if not ordered:
        return losses
    first = next(iter(losses.terms))
    terms = {**losses.terms, first: losses.terms[first] * ordered[0]}
    return replace(losses, total=losses.total * ordered[0], terms=terms)


_DISTURBANCES = (("nan", float("nan")), ("spike", 1000.0))
