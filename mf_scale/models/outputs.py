"""What the models return, with masks, class logits and per-pixel logits kept factored.

Shapes: B images, Q queries, C mask channels, W width of class embeddings, K classes, h w prediction resolution, S
supervised decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Classifier:
    """What turns class embeddings into class logits; its tensors are copies, which nobody has to gather."""

    weight: Tensor
    """[K+1,W]: a row a class; the last is no-object's."""
    bias: Tensor | None = None
    """[K+1], added to the product; None: nothing is."""

    def logits(self, embeddings: Tensor) -> Tensor:
        """Class logits [.,K+1] of embeddings [.,W], in fp32 or the wider type of the two; index K is no-object."""
        import torch
        from torch.nn import functional as F

        dtype = torch.promote_types(torch.promote_types(embeddings.dtype, self.weight.dtype), torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(embeddings.to(dtype), self.weight.to(dtype), bias)

    @property
    def classes(self) -> int:
        """K, no-object not among them."""
        return self.weight.shape[0] - 1


@dataclass
class LayerPrediction:
    """The queries of one decoder layer, or of several: [B,S,Q,.] then."""

    class_embeddings: Tensor
    """[B,Q,W]; their product with the classifier is the class logits."""
    mask_embeddings: Tensor
    """[B,Q,C]; their product with the pixel embeddings is the mask logits."""


@dataclass
class MaskPrediction:
    """A model's answer. Mask logits [B,Q,h,w] and class logits are products, only made where they are needed."""

    class_embeddings: Tensor
    """[B,Q,W] of the last decoder layer."""
    mask_embeddings: Tensor
    """[B,Q,C] of the last decoder layer."""
    pixel_embeddings: Tensor
    """[B,C,h,w], shared by all layers."""
    classifier: Classifier
    """Shared by all layers."""
    aux: tuple[LayerPrediction, ...] = ()
    """Predictions of the earlier decoder layers, first layer first (deep supervision)."""

    @property
    def class_logits(self) -> Tensor:
        """[B,Q,K+1] of the last decoder layer, multiplied out at every call; index K is no-object."""
        return self.classifier.logits(self.class_embeddings)

    def first(self, count: int) -> MaskPrediction:
        """Of the first `count` images only."""
        return MaskPrediction(
            self.class_embeddings[:count],
            self.mask_embeddings[:count],
            self.pixel_embeddings[:count],
            self.classifier,
            tuple(LayerPrediction(layer.class_embeddings[:count], layer.mask_embeddings[:count]) for layer in self.aux),
        )

    def layers(self) -> tuple[LayerPrediction, ...]:
        """All supervised layers, the last one last: S = len(aux) + 1."""
        return (*self.aux, LayerPrediction(self.class_embeddings, self.mask_embeddings))

    def stacked(self) -> LayerPrediction:
        """All supervised layers in two tensors: class_embeddings [B,S,Q,W] and mask_embeddings [B,S,Q,C]."""
        import torch

        layers = self.layers()
        return LayerPrediction(
            torch.stack([layer.class_embeddings for layer in layers], dim=1),
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
