"""(The per-pixel helper writes this file: convert.pixel_level(config) -> (backbone, pixel_decoder).)"""

from __future__ import annotations
from torch import nn
from mf_scale.config.schema import ModelConfig
from mf_scale.models.pixel_level import PixelBackbone, PixelEmbedder


def pixel_level(config: ModelConfig) -> tuple[PixelBackbone, PixelEmbedder]:
    raise NotImplementedError
