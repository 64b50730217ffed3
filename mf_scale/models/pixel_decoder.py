"""The FPN pixel decoder: features at strides 32, 16, 8, 4 -> pixel embeddings at stride 4."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class PixelDecoder(nn.Module):
    """Feature pyramid network with group norm; pixel embeddings [B,C,h,w] at stride 4.

    Source: MaskFormer section 4.1: the coarsest map goes through a 3x3 convolution; going up, a 1x1 lateral is
    added to the nearest-upsampled sum and smoothed by a 3x3 convolution; a last 3x3 makes the C mask channels.
    """

    def __init__(self, channels: Sequence[int], width: int, mask_channels: int) -> None:
        """`channels` of the features from stride 4 to 32; `width` of the FPN; `mask_channels` C."""
        super().__init__()
        self.coarsest = _convolution(channels[-1], width, 3)
        self.laterals = nn.ModuleList(_convolution(c, width, 1) for c in reversed(channels[:-1]))
        self.smooths = nn.ModuleList(_convolution(width, width, 3) for _ in channels[:-1])
        self.mask_features = nn.Conv2d(width, mask_channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """`features` from stride 4 to 32, each [B,c,h,w]."""
        top = F.relu(self.coarsest(features[-1]))
        for lateral, smooth, feature in zip(self.laterals, self.smooths, reversed(features[:-1]), strict=True):
            top = lateral(feature) + F.interpolate(top, size=feature.shape[-2:], mode="nearest")
            top = F.relu(smooth(top))
        return self.mask_features(top)


def _convolution(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """Convolution without bias and group norm of 32 groups (of fewer where 32 does not divide the channels)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        nn.GroupNorm(math.gcd(32, outputs), outputs),
    )
