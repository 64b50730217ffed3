"""What one micro-batch takes beyond the states: forward, loss and backward run on tensors that have no numbers.

The program's own model, loss and autocast run, so recomputed stages, precision and the kind of attention are in it by
themselves. It takes a second or two, whatever the size of the micro-batch.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mf_scale.config.schema import Config
from mf_scale.data.batch import Batch
from mf_scale.errors import UserError
from mf_scale.losses.criterion import Criterion
from mf_scale.models.outputs import MaskPrediction, PixelPrediction
from mf_scale.plan.parts import bare_model
from mf_scale.plan.stand_ins import (
    FusedAttention,
    empty_batch,
    made_up_pairs,
    matching_workspace,
    pixel_loss,
    pixel_workspace,
    without_numbers,
    workspaces,
)
from mf_scale.plan.tracker import Tracker
from mf_scale.training.precision import autocast


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, gradients of the parameters not among them."""

    micro_batch: int
    kept: int | None
    """What forward and loss leave behind for the backward pass; None: measured, which shows the peak alone."""
    peak: int
    """The most that was held at once."""
    inputs: int
    """The micro-batch itself; on a GPU the next one's copy is there too."""

    @property
    def total(self) -> int:
        """With the inputs."""
        return self.peak + self.inputs


class Tracer:
    """Traces micro-batches of data.crop, each size once."""

    def __init__(self, config: Config, *, segments: int, device: str, where: str = "configuration") -> None:
        """With `segments` segments an image, as on a `device`, "cuda" or "cpu"; model.num_classes is set."""
        self._config, self._segments, self._device, self._where = config, segments, device, where
        self._known: dict[int, Activations] = {}
        self._mode = FakeTensorMode()
        self._fake: nn.Module | None = None

    def __call__(self, micro_batch: int) -> Activations:
        """Of `micro_batch` images. Raises UserError for a model that reads numbers in its forward pass."""
        if micro_batch not in self._known:
            try:
                self._known[micro_batch] = self._trace(micro_batch)
            except UserError:
                raise
            except Exception as error:  # models of users' own may do anything; the reason is passed on
                first = (str(error).splitlines() or [""])[0]
                raise UserError(
                    f"the activations cannot be computed, as the model needs numbers to run: "
                    f"{type(error).__name__} {first}",
                    where=self._where,
                    remedy="Measure them instead: --measure.",
                ) from error
        return self._known[micro_batch]

    def _trace(self, micro_batch: int) -> Activations:
        config = self._config
        fused = self._device == "cuda" and config.model.attention != "reference"
        model = self._model()
        with self._mode:
            batch = empty_batch(micro_batch, config.data.crop, self._segments)
            given = [batch.images, batch.segment_map, batch.labels, batch.segment_layer]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            before = [*model.parameters(), *model.buffers(), *gradients, *given]
            tracker = Tracker(before, workspaces(config, self._device))
            with FusedAttention() if fused else nullcontext(), tracker:
                with autocast(torch.device("cpu"), config.train.precision):
                    prediction = model(batch.images)
                loss = self._loss(prediction, batch, tracker)
                del prediction
                kept = tracker.live
                loss.backward()
        copies = 2 if self._device == "cuda" else 0
        return Activations(micro_batch, kept, tracker.peak, copies * sum(t.nbytes for t in given))

    def _model(self) -> nn.Module:
        """The model without numbers, in training, with gradients that stand already, as from the second pass on."""
        if self._fake is None:
            model = bare_model(_as_on(self._config)).train()
            with self._mode:
                self._fake = without_numbers(model)
                for parameter in self._fake.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.empty_like(parameter)
        return self._fake

    def _loss(self, prediction: MaskPrediction | PixelPrediction, batch: Batch, tracker: Tracker) -> Tensor:
        if isinstance(prediction, PixelPrediction):
            tracker.workspace(pixel_workspace(prediction, batch, self._device))
            return pixel_loss(prediction)
        config = self._config
        criterion = Criterion(
            _as_on(config).loss, config.matching, int(config.model.num_classes or 0), config.model.decoder.queries
        )
        with torch.autocast("cpu", enabled=False):
            stacked = prediction.stacked()
        tracker.workspace(matching_workspace(prediction, batch, config, self._device))
        pairs = made_up_pairs(prediction, batch)
        normalisers = criterion.normalisers([1.0] * criterion.summed)
        return criterion.of_pairs(prediction, stacked, batch, pairs, normalisers).total


def _as_on(config: Config) -> Config:
    """The configuration whose operators are traced: kernels that are no torch operators are not asked for."""
    kernel = "reference" if config.model.attention == "reference" else "auto"
    loss = replace(config.loss, points=0, kernels="eager")  # traced as the one operator; points are a workspace
    return replace(config, model=replace(config.model, attention=kernel), loss=loss)
