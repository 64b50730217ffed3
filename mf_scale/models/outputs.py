"""What the models return, with masks and per-pixel logits kept factored.

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

    def first(self, count: int) -> MaskPrediction:
        """Of the first `count` images only."""
        return MaskPrediction(
            self.class_logits[:count],
            self.mask_embeddings[:count],
            self.pixel_embeddings[:count],
            tuple(LayerPrediction(layer.class_logits[:count], layer.mask_embeddings[:count]) for layer in self.aux),
        )

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


@dataclass
class PixelPrediction:
    """A per-pixel model's answer. The class logits [B,K,h,w] are a product that is only made where it is needed."""

    class_embeddings: Tensor
    """[B,K,C]: of the last decoder layer, or the rows of the classifier, the same for every image."""
    pixel_embeddings: Tensor
    """[B,C,h,w], shared by all layers."""
    bias: Tensor | None = None
    """[K], added to the product; None: nothing is."""
    aux: tuple[Tensor, ...] = ()
    """Class embeddings [B,K,C] of the earlier decoder layers, first layer first (deep supervision)."""

    def first(self, count: int) -> PixelPrediction:
        """Of the first `count` images only."""
        aux = tuple(embeddings[:count] for embeddings in self.aux)
        return PixelPrediction(self.class_embeddings[:count], self.pixel_embeddings[:count], self.bias, aux)

    def stacked(self) -> Tensor:
        """Class embeddings of all supervised layers [B,S,K,C], the last one last: S = len(aux) + 1."""
        import torch

        return torch.stack((*self.aux, self.class_embeddings), dim=1)

    def logits(self) -> Tensor:
        """Class logits [B,K,h,w] of the last layer."""
        import torch

        product = torch.einsum("bkc,bchw->bkhw", self.class_embeddings, self.pixel_embeddings)
        return product if self.bias is None else product + self.bias[:, None, None]
