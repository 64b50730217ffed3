"""What the mask loss is made with, for every kernel alike."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """Weights and form of focal and dice loss."""

    focal_weight: float
    dice_weight: float
    alpha: float
    """Focal weight of pixels inside the segment; the others have 1 - alpha."""
    gamma: float
    exclude: bool
    """Ignored pixels leave every sum; else they are negatives."""
