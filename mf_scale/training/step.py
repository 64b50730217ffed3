"""One step: k micro-batches, with the loss's normalisers counted over the whole step before the first forward."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mf_scale.config.validate import BatchPlan
from mf_scale.data.batch import Batch
from mf_scale.data.collate import cut
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine, StepOutcome
from mf_scale.distributed.env import World
from mf_scale.losses.terms import StepLoss


@dataclass(frozen=True)
class Agreement:
    """What all ranks know before a step's first forward, from one collective over the CPU."""

    normalisers: Any
    """What the loss divides by, made by `StepLoss.normalisers`."""
    stop: bool
    """Some rank was asked to stop."""
    save: bool
    """Rank 0's clock says that a checkpoint is due."""
    quarantined: int
    """Samples of this step that were replaced, all ranks."""
    failed: bool
    """Some rank cannot go on (it has no batch, or nowhere to write): all of them end here, nobody is left waiting."""


@dataclass(frozen=True)
class StepResult:
    """What a step did on this rank."""

    outcome: StepOutcome
    terms: Tensor
    """fp32 on the device, by `StepLoss.names`: this rank's share of the step's weighted loss terms."""
    counts: list[int]
    """By `StepLoss.counted`, of this rank."""
    replaced_costs: list[dict[str, object]]
    """Non-finite matching costs that were replaced."""


def agree(batch: Batch | None, criterion: StepLoss, *, stop: bool, save: bool, failed: bool) -> Agreement:
    """Sum what the step needs over the ranks. Micro-batches are parts of `batch`, so its totals are theirs."""
    flags, totals = [stop, save, 0, failed], [0.0] * criterion.summed
    if batch is not None:
        flags[2] = sum(event.get("event") == "quarantine" for event in batch.events)
        totals = [*criterion.totals(batch)]
    stops, saves, bad, fails, *totals = comm.sum_array(np.array([*flags, *totals], dtype=np.float64)).tolist()
    return Agreement(criterion.normalisers(totals), bool(stops), bool(saves), int(bad), bool(fails))


def train_step(
    engine: Engine,
    criterion: StepLoss,
    batch: Batch,
    agreement: Agreement,
    *,
    plan: BatchPlan,
    world: World,
    seed: int,
    step: int,
    device: torch.device,
    lr_factor: float,
) -> StepResult:
    """Train on this rank's share of global batch `step`."""
    terms = torch.zeros(len(criterion.names), device=device)
    counts, replaced = [0] * len(criterion.counted), []
    # The engine averages over ranks and accumulation; the normalisers already belong to the whole step.
    scale = plan.world_size * plan.accumulation
    outcome = None
    for number in range(plan.accumulation):
        first = number * plan.micro_batch
        micro = to_device(cut(batch, first, first + plan.micro_batch), device)
        seed_model(seed, step, lane=world.rank + world.size * first)
        losses = criterion(engine.forward(micro.images), micro, agreement.normalisers)
        engine.backward(losses.total * scale)
        terms += torch.stack([losses.terms[name] for name in criterion.names])
        counts = [so_far + losses.counts[name] for so_far, name in zip(counts, criterion.counted, strict=True)]
        replaced += losses.nonfinite
        if number + 1 < plan.accumulation:
            engine.end_micro_batch()
        else:
            outcome = engine.step(lambda group: group["base_lr"] * lr_factor)
    assert outcome is not None  # accumulation is at least 1
    return StepResult(outcome, terms, counts, replaced)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    names = ("images", "segment_map", "labels", "segment_layer")
    return replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names})


def seed_model(seed: int, step: int, lane: int) -> None:
    """Seed what is random in the model (dropout, stochastic depth) from the step and the micro-batch's first lane.

    So a resumed run repeats it, and nothing of the generators needs saving.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{lane}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
