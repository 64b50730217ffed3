"""The two halves of the pixel-level module, as the assembly sees them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class PixelBackbone(nn.Module):
    """Normalised images [B,3,H,W] -> features, finest first, and what has to be known of them."""

    mean: Sequence[float]
    """Of the images it expects, RGB in 0..1."""
    std: Sequence[float]
    """Of the images it expects, RGB in 0..1."""
    channels: list[int]
    """Of each feature."""
    stride: int
    """Image pixels per cell of the finest feature."""
    notes: Sequence[str] = ()
    """What a person should know about how it was made."""


class PixelEmbedder(nn.Module):
    """Features -> (pixel embeddings [B,C,h,w] at the finest stride, memory [B,c,h',w'] that queries attend to)."""

    channels: int
    """C."""
    memory_channels: int
    """c."""
