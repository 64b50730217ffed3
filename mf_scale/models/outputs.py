"""What a mask-classification model returns: class logits and masks kept factored.

Shapes: B images, Q queries, C channels, K classes, h w prediction resolution, S supervised decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LayerPrediction:
    """The queries of one decoder layer."""

    class_logits: Tensor
    """[B,Q,K+1]; index K is no-object."""
    mask_embeddings: Tensor
    """[B,Q,C]; their product with the pixel embeddings is the mask logits."""


@dataclass
class MaskPrediction:
    """A model's answer. The mask logits [B,Q,h,w] are a product that is only made where it is needed."""

    class_logits: Tensor
    """[B,Q,K+1] of the last decoder layer."""
    mask_embeddings: Tensor
    """[B,Q,C] of the last decoder layer."""
    pixel_embeddings: Tensor
    """[B,C,h,w], shared by all layers."""
    aux: tuple[LayerPrediction, ...] = ()
    """Predictions of the earlier decoder layers, first layer first (deep supervision)."""

    def layers(self) -> tuple[LayerPrediction, ...]:
        """All supervised layers, the last one last: S = len(aux) + 1."""
        return (*self.aux, LayerPrediction(self.class_logits, self.mask_embeddings))

    def stacked(self) -> LayerPrediction:
        """All supervised layers in two tensors: class_logits [B,S,Q,K+1] and mask_embeddings [B,S,Q,C]."""
        import torch

        layers = self.layers()
        return LayerPrediction(
            torch.stack([layer.class_logits for layer in layers], dim=1),
            torch.stack([layer.mask_embeddings for layer in layers], dim=1),
        )
