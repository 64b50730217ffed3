"""The model without its memory: names and shapes of what a checkpoint of this configuration holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from mf_scale.config.consent import belongs_to_a_checkpoint, refuse_unasked_code
from mf_scale.config.schema import Config
from mf_scale.training.initial import refuse_uneven_crop

_FP32 = 4


@dataclass(frozen=True)
class ModelSize:
    """What is known of a model on the meta device."""

    tensors: dict[str, Tensor]
    """Its state_dict, on the meta device."""
    trainable: int
    """Elements that are trained."""
    module: nn.Module

    def refuse_crop(self, config: Config) -> None:
        """UserError where data.crop is no multiple of the model's stride, as a start has it."""
        refuse_uneven_crop(self.module, config)

    def checkpoint(self, config: Config) -> int:
        """Bytes of one checkpoint, computed: weights and buffers, Adam's moments, and the average where it is kept."""
        weights = sum(value.numel() * value.element_size() for value in self.tensors.values())
        return weights + self.trainable * _FP32 * (2 + bool(config.ema.decay))


def model_size(config: Config, classes: int, file: Path, overrides: Sequence[str]) -> ModelSize:
    """Build the model on the meta device: no weights are read. Raises UserError where it cannot be built, and what
    a builder of the user's own raises, which may want numbers where there are none.

    A builder that only the configuration `file` of a checkpoint names is not called.
    """
    import torch

    from mf_scale.models.build import build_model

    if belongs_to_a_checkpoint(file):
        refuse_unasked_code(config, overrides, file)
    bare = replace(config.model, backbone=replace(config.model.backbone, weights="none"))
    with torch.device("meta"), torch.no_grad():
        model = build_model(bare, classes, seed=0)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelSize(model.state_dict(), trainable, model)
