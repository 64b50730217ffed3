"""Any per-pixel segmentation model as the pixel level of a MaskFormer. Source: MaskFormer sections 3.2 and 3.3.

The paper: the pixel-level module may be any per-pixel model without its classifier; loss and training stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.config.schema import ModelConfig
from mf_scale.models.backbones import STRIDES, freeze_norms
from mf_scale.models.builder import build_own
from mf_scale.models.cut import CutModel
from mf_scale.models.maskformer import MaskFormer
from mf_scale.models.pixel_level import PixelBackbone, PixelEmbedder
from mf_scale.models.trial import find_classifier

_TRIAL_SIDES = (128, 192, 256)
"""Pixels, rounded up to the size divisor: large enough for a few cells at stride 32."""


class ProjectedFeatures(PixelEmbedder):
    """Features of a per-pixel model -> pixel embeddings by a 1x1 convolution; memory as given, or averaged features."""

    def __init__(self, channels: Sequence[int], stride: int, mask_channels: int | None) -> None:
        """`channels` of the features and, where it is a layer of its own, of the memory; no `mask_channels`: the
        features are the pixel embeddings themselves."""
        super().__init__()
        self.channels, self.memory_channels = mask_channels or channels[0], channels[-1]
        self.project = nn.Conv2d(channels[0], mask_channels, 1) if mask_channels else nn.Identity()
        if isinstance(self.project, nn.Conv2d):
            nn.init.kaiming_uniform_(self.project.weight, a=1)
            nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]
        self.shrink = max(1, STRIDES[-1] // stride) if len(channels) == 1 else 1

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """[features] or [features, memory], each [B,c,h,w]; finer features than stride 32 are averaged down to it."""
        memory = features[-1]
        if self.shrink > 1:
            memory = F.avg_pool2d(memory, self.shrink, ceil_mode=True)
        return self.project(features[0]), memory


def to_mask_classification(
    model: nn.Module,
    num_classes: int,
    *,
    features: str | None = None,
    memory: str | None = None,
    config: ModelConfig | None = None,
) -> MaskFormer:
    """A MaskFormer on top of `model`, a segmentation model that takes images [B,3,H,W]; it keeps the model's weights.

    `features` is the path of its classifier (`classifier.4`), whose input becomes the features; None: found by a trial
    run. `memory` is the path of the layer whose output [B,c,h,w] the queries attend to; None: the features, averaged
    down to stride 32. `config` gives decoder, mask channels, size divisor and, under pixel_level, mean and std of the
    images. What the features do not depend on is frozen. With `config.backbone.freeze_norm` the batch norms of `model`
    are replaced by frozen ones, in place; else `model` stays as it was, sharing its weights. The new parts are
    initialised by torch's random state. UserError for a model or a layer that does not fit.
    """
    config = config or ModelConfig()
    given = config.pixel_level
    chosen = replace(given, features=features or given.features, memory=memory or given.memory)
    config = replace(config, kind="mask_classification", pixel_level=chosen)
    return MaskFormer(*_converted(model, config), config, num_classes)


def pixel_level(config: ModelConfig) -> tuple[PixelBackbone, PixelEmbedder]:
    """Backbone and pixel decoder from the model that `config.pixel_level.builder` builds. This runs its code."""
    return _converted(build_own(config.pixel_level), config)


def _converted(model: nn.Module, config: ModelConfig) -> tuple[PixelBackbone, PixelEmbedder]:
    given = config.pixel_level
    if config.backbone.freeze_norm:
        model = freeze_norms(model)
    low, middle, high = (-(-side // config.size_divisor) * config.size_divisor for side in _TRIAL_SIDES)
    sizes = (low, middle), (middle, high)
    # A classifier on the features is all that a per-pixel model has behind them.
    per_pixel = config.kind == "per_pixel"
    backbone = CutModel(
        model, given.features or find_classifier(model, sizes[0]), None if per_pixel else given.memory, sizes
    )
    backbone.mean, backbone.std = tuple(given.mean), tuple(given.std)
    channels = None if per_pixel else config.pixel_decoder.mask_channels
    return backbone, ProjectedFeatures(backbone.channels, backbone.stride, channels)
