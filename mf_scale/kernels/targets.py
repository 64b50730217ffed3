"""What the pairs are compared with, checked and brought into one form before a kernel reads it by address."""

from __future__ import annotations

import torch
from torch import Tensor


def signed_map(segment_map: Tensor) -> Tensor:
    """The map in int16. One of bytes holds the same values modulo 256 (NONE 255, IGNORE 254), so for T <= 254 only."""
    if segment_map.dtype == torch.int16:
        return segment_map
    wide = segment_map.to(torch.int16)
    return torch.where(wide >= 254, wide - 256, wide) if segment_map.dtype == torch.uint8 else wide


def checked_targets(
    logits: Tensor, segment_map: Tensor, segments: Tensor, layers: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The map in int16 and the indices in int64, all contiguous and within the map's layers; reads no value.

    `logits` [B,P,h,w], `segment_map` [B,L,H,W], `segments`, `layers` [B,P], `counts` [B]. Raises ValueError for shapes
    that do not fit and for fractions.
    """
    check_shapes(logits, segment_map, segments, layers, counts)
    indices = (segments, layers.clamp(0, max(0, segment_map.shape[1] - 1)), counts.clamp(0, segments.shape[1]))
    segments, layers, counts = (index.to(torch.int64).contiguous() for index in indices)
    return signed_map(segment_map).contiguous(), segments, layers, counts


def check_shapes(logits: Tensor, segment_map: Tensor, segments: Tensor, layers: Tensor, counts: Tensor) -> None:
    """Raises ValueError for what does not fit together or is on another device."""
    B, P = logits.shape[:2]
    fits = (
        logits.dim() == segment_map.dim() == 4
        and len(segment_map) == B
        and segments.shape == layers.shape == (B, P)
        and counts.shape == (B,)
        and (B * P == 0 or 0 not in (*logits.shape, *segment_map.shape))
    )
    targets = (segment_map, segments, layers, counts)
    if not fits:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (logits, *targets))
        raise ValueError(f"logits, segment map, segments, layers and counts do not fit together: {shapes}")
    for tensor in targets:
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"maps, segments, layers and counts are whole numbers, not {tensor.dtype}")
        if tensor.device != logits.device:
            raise ValueError(f"logits on {logits.device}, what they are compared with on {tensor.device}")
