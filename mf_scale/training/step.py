"""One step: k micro-batches, with the loss's normalisers counted over the whole step before the first forward."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mf_scale.config.validate import BatchPlan
from mf_scale.data.batch import Batch
from mf_scale.data.collate import cut
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine, StepOutcome
from mf_scale.distributed.env import World
from mf_scale.losses.criterion import Criterion, Normalisers, target_totals

TERMS = ("class", "focal", "dice")


@dataclass(frozen=True)
class Agreement:
    """What all ranks know before a step's first forward, from one collective over the CPU."""

    normalisers: Normalisers
    segments: int
    """Segments of the step, all ranks."""
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
    """fp32 [len(TERMS)] on the device: this rank's share of the step's weighted loss terms."""
    matched: int
    """Matched pairs of the last layer, this rank."""
    surplus: int
    """Segments beyond the queries, this rank."""
    replaced_costs: list[dict[str, object]]
    """Non-finite matching costs that were replaced."""


def agree(
    batch: Batch | None, criterion: Criterion, queries: int, *, stop: bool, save: bool, failed: bool
) -> Agreement:
    """Sum what the step needs over the ranks. Micro-batches are parts of `batch`, so its totals are theirs."""
    segments, class_weight, bad = 0.0, 0.0, 0
    if batch is not None:
        segments, class_weight = target_totals(batch, queries, criterion.loss.no_object_weight)
        bad = sum(event.get("event") == "quarantine" for event in batch.events)
    total = comm.sum_array(np.array([segments, class_weight, stop, save, bad, failed], dtype=np.float64))
    normalisers = Normalisers(num_masks=max(1.0, float(total[0])), class_weight=float(total[1]))
    return Agreement(normalisers, int(total[0]), bool(total[2]), bool(total[3]), int(total[4]), bool(total[5]))


def train_step(
    engine: Engine,
    criterion: Criterion,
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
    terms = torch.zeros(len(TERMS), device=device)
    matched, surplus, replaced = 0, 0, []
    # The engine averages over ranks and accumulation; the normalisers already belong to the whole step.
    scale = plan.world_size * plan.accumulation
    outcome = None
    for number in range(plan.accumulation):
        first = number * plan.micro_batch
        micro = to_device(cut(batch, first, first + plan.micro_batch), device)
        seed_model(seed, step, lane=world.rank + world.size * first)
        losses = criterion(engine.forward(micro.images), micro, agreement.normalisers)
        engine.backward(losses.total * scale)
        terms += torch.stack([losses.terms[name] for name in TERMS])
        matched, surplus = matched + losses.matched, surplus + losses.surplus
        replaced += losses.nonfinite
        if number + 1 < plan.accumulation:
            engine.end_micro_batch()
        else:
            outcome = engine.step(lambda group: group["base_lr"] * lr_factor)
    assert outcome is not None  # accumulation is at least 1
    return StepResult(outcome, terms, matched, surplus, replaced)


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
