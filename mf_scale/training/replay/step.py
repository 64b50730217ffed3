"""A global batch as the ranks of a run had it: their micro-batches, and the loss of each under its own seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.data.batch import Batch
from mf_scale.losses.terms import StepLoss
from mf_scale.training.seeding import seed_model
from mf_scale.training.step import disturbed
from mf_scale.training.transfer import batch_tensors


@dataclass(frozen=True)
class MicroBatch:
    """A part of a global batch, as one rank of the run had it."""

    rank: int
    number: int
    """Among this rank's micro-batches of the step, from 0."""
    lane: int
    """Its first lane, from which the model's randomness is seeded."""
    batch: Batch


def micro_batches(batch: Batch, *, world: int, size: int) -> Iterator[MicroBatch]:
    """A global batch in lane order, cut as `world` ranks with micro-batches of `size` samples cut it, rank by rank."""
    share = len(batch.keys) // world
    for rank in range(world):
        for number in range(share // size):
            lane = rank + world * number * size
            yield MicroBatch(rank, number, lane, _rows(batch, slice(lane, lane + world * size, world)))


def _rows(batch: Batch, rows: slice) -> Batch:
    tensors: dict[str, Any] = {name: tensor[rows].contiguous() for name, tensor in batch_tensors(batch).items()}
    return replace(batch, **tensors, keys=batch.keys[rows], events=[])


class StepAgain:
    """The loss of the micro-batches of one global batch, with what surrounded it in the run."""

    def __init__(
        self,
        model: nn.Module,
        criterion: StepLoss,
        batch: Batch,
        *,
        seed: int,
        step: int,
        precision: str,
        loss_scale: float,
    ) -> None:
        """`batch` is the whole global batch number `step` (from 0), on the CPU."""
        self._model, self._criterion = model, criterion
        self._seed, self._step, self._precision, self._loss_scale = seed, step, precision, loss_scale
        self._device = next(model.parameters()).device
        self._normalisers = criterion.normalisers([*criterion.totals(batch)])
        self.terms: dict[str, Tensor] = {}
        """Of the last micro-batch; empty where its loss was not reached."""

    def loss(self, micro: MicroBatch) -> Tensor:
        """The loss of one micro-batch times the loss scale; over a step's micro-batches they add up to its loss."""
        self.terms = {}
        tensors: dict[str, Any] = {name: tensor.to(self._device) for name, tensor in batch_tensors(micro.batch).items()}
        part = replace(micro.batch, **tensors)
        seed_model(self._seed, self._step, micro.lane)
        with autocast(self._precision, self._device):
            prediction = self._model(part.images)
        losses = self._criterion(prediction, part, self._normalisers)
        losses = disturbed(losses, rank=micro.rank, step=self._step + 1)
        self.terms = {name: losses.terms[name] for name in self._criterion.names}
        return losses.total * self._loss_scale


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast of a run's precision; none for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
