"""The pixel decoder: features at strides 4 to 32 -> pixel embeddings at stride 4, and the map the queries attend to."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.config.schema import ModelConfig
from mf_scale.models.pixel_level import PixelEmbedder
from mf_scale.models.transformer_encoder import TransformerEncoder


class PixelDecoder(PixelEmbedder):
    """Feature pyramid network with group norm; pixel embeddings [B,C,h,w] at stride 4, memory [B,c,h,w] at stride 32.

    Source: MaskFormer section 4.1: the coarsest map goes through a 3x3 convolution; going up, a 1x1 lateral is
    added to the nearest-upsampled sum and smoothed by a 3x3 convolution; a last 3x3 makes the C mask channels. The
    queries attend to the coarsest feature; with `encoder_layers` (the paper's panoptic setting with ResNets) it goes
    through a Transformer encoder first, whose output both of them take.
    """

    def __init__(self, channels: Sequence[int], config: ModelConfig) -> None:
        """`channels` of the features from stride 4 to 32."""
        super().__init__()
        sizes = config.pixel_decoder
        width, coarsest, encoded = sizes.width, channels[-1], sizes.encoder_layers > 0
        if encoded:
            self.encoder: nn.Module = TransformerEncoder(
                coarsest, width, sizes.encoder_layers, config.decoder, config.attention
            )
            coarsest = width
        else:
            self.encoder = nn.Identity()
        self.channels, self.memory_channels = sizes.mask_channels, coarsest
        self.coarsest = _convolution(coarsest, width, 3)
        self.laterals = nn.ModuleList(_convolution(c, width, 1) for c in reversed(channels[:-1]))
        self.smooths = nn.ModuleList(_convolution(width, width, 3) for _ in channels[:-1])
        self.mask_features = nn.Conv2d(width, sizes.mask_channels, 3, padding=1)
        for part in (self.coarsest, self.laterals, self.smooths, self.mask_features):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_uniform_(module.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`features` from stride 4 to 32, each [B,c,h,w] -> (pixel embeddings, memory)."""
        memory = self.encoder(features[-1])
        top = F.relu(self.coarsest(memory))
        for lateral, smooth, feature in zip(self.laterals, self.smooths, reversed(features[:-1]), strict=True):
            top = lateral(feature) + F.interpolate(top, size=feature.shape[-2:], mode="nearest")
            top = F.relu(smooth(top))
        return self.mask_features(top), memory


def _convolution(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """Convolution without bias and group norm of 32 groups (of fewer where 32 does not divide the channels)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        nn.GroupNorm(math.gcd(32, outputs), outputs),
    )
