"""(The per-pixel helper writes this file.)"""

from __future__ import annotations
from torch import nn
from mf_scale.config.schema import ModelConfig
from mf_scale.models.pixel_level import PixelBackbone, PixelEmbedder


def build(backbone: PixelBackbone, pixel_decoder: PixelEmbedder, config: ModelConfig, num_classes: int) -> nn.Module:
    raise NotImplementedError
