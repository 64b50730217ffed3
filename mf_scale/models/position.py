"""Sine position embedding of a feature map."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_position(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Fixed position embedding [h*w,C] in fp32, rows first; first half of C encodes y, second half x.

    `channels` must divide by 4. Source: DETR (Carion et al. 2020, appendix A.4), coordinates scaled to (0, 2 pi],
    temperature 10000, as MaskFormer uses it for the stride-32 map.
    """
    half = channels // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)

    def encode(length: int) -> Tensor:
        place = torch.arange(1, length + 1, device=device, dtype=torch.float32) * (2 * math.pi / (length + 1e-6))
        angle = place[:, None] * frequency
        return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)

    rows = encode(height)[:, None].expand(height, width, half)
    columns = encode(width)[None].expand(height, width, half)
    return torch.cat((rows, columns), dim=2).flatten(0, 1)
