"""The batch: images and segment maps in fixed shapes.

Shapes: B images, L map layers, T segments, K classes, H W full resolution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NONE = -1
"""Map value: no segment of this layer here; a negative for every segment of the layer."""
IGNORE = -2
"""Map value (layer 0): outside the loss and the metrics."""
NO_LABEL = -1
"""Label of the padding behind an image's last segment."""
UNKNOWN = 1
"""Class mask: whether the class is in this image nobody knows; it is neither right nor wrong anywhere."""
NOT_EXHAUSTIVE = 2
"""Class mask: some segments of the class are marked and others may not be; it is not wrong where none is marked."""


@dataclass
class Batch:
    """Part of a global batch, as the workers hand it over and the model takes it."""

    images: Tensor
    """uint8 [B,3,H,W], RGB; normalised on the device."""
    segment_map: Tensor
    """int16 [B,L,H,W]: pixel -> segment index, NONE or IGNORE."""
    labels: Tensor
    """int64 [B,T]: class of each segment, NO_LABEL behind the image's last segment."""
    segment_layer: Tensor
    """int64 [B,T]: layer of the map that holds the segment."""
    keys: list[str]
    """Sample keys, in batch order."""
    class_mask: Tensor | None = None
    """uint8 [B,K]: 0 counts, UNKNOWN, NOT_EXHAUSTIVE; None, in all batches of a run, if all is known of all images."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What happened while the samples were made: quarantined samples, dropped segments."""

    def __len__(self) -> int:
        return len(self.keys)
