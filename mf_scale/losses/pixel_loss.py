"""Per-pixel cross-entropy at full resolution from factored logits, the gradient made in the forward.

Logits of all classes exist for one image and layer at prediction resolution, and for a band of rows at the map's. What
is kept for backward are gradients of the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mf_scale.kernels.eager import interpolation

UNCOUNTED = -1
"""Class of a pixel that is not in the loss."""
_BAND_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
"""Logits worked on at once: what about stays in a CPU's cache, 128 MiB on a GPU."""


def pixel_loss(
    class_embeddings: Tensor,
    pixel_embeddings: Tensor,
    bias: Tensor,
    classes: Tensor,
    unknown: Tensor | None = None,
) -> Tensor:
    """Sum over images, layers and counted pixels of the cross-entropy of upsampled logits; differentiable scalar.

    `class_embeddings` [B,S,K,C], `pixel_embeddings` [B,C,h,w], `bias` [K], all fp32 or fp64; `classes` int64 [B,H,W]
    with UNCOUNTED. `unknown` bool [B,K]: classes that are not in the softmax of the image, none of them a pixel's;
    their gradients are exactly 0. Bilinear upsampling with align_corners False, as in the paper's code.
    """
    return pixel_losses(class_embeddings, pixel_embeddings, bias, classes, unknown)[0]


def pixel_losses(
    class_embeddings: Tensor,
    pixel_embeddings: Tensor,
    bias: Tensor,
    classes: Tensor,
    unknown: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, and the sums of each layer [S], which have no gradient."""
    if unknown is not None:  # of an image without a known class no pixel counts: a softmax over nothing would be NaN
        unknown = unknown & ~unknown.all(1, keepdim=True)
    total, by_layer = _PixelLoss.apply(class_embeddings, pixel_embeddings, bias, classes, unknown)
    return total, by_layer


class _PixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, pixels: Tensor, bias: Tensor, classes: Tensor, unknown: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        gradients = [t.new_zeros(t.shape) for t in (embeddings, pixels, bias)] if wanted else None  # contiguous
        upsample = _Upsampling(pixels.shape[-2:], classes.shape[-2:], pixels)
        total, by_layer = pixels.new_zeros(()), pixels.new_zeros(embeddings.shape[1])
        for b, image in enumerate(pixels.flatten(2)):
            out = None if unknown is None else unknown[b, :, None, None]
            for s, rows in enumerate(embeddings[b]):
                logits = torch.addmm(bias[:, None], rows, image).unflatten(1, pixels.shape[-2:])
                loss, at_logits = _cross_entropy(logits, classes[b], out, upsample, wanted)
                total += loss
                by_layer[s] += loss
                if gradients is not None and at_logits is not None:
                    flat = at_logits.flatten(1)
                    torch.matmul(flat, image.T, out=gradients[0][b, s])
                    gradients[1][b].flatten(1).addmm_(rows.T, flat)
                    gradients[2] += flat.sum(1)
        ctx.save_for_backward(*(gradients or ()))
        ctx.mark_non_differentiable(by_layer)
        return total, by_layer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * grad_total for gradient in ctx.saved_tensors), None, None)


def _cross_entropy(
    logits: Tensor, classes: Tensor, out: Tensor | None, upsample: _Upsampling, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one image's coarse logits [K,h,w] against classes [H,W], and the gradient of it, [K,h,w].

    Classes that are `out`, bool [K,1,1], leave the softmax after the upsampling, which would make NaN of -inf.
    """
    total = logits.new_zeros(())
    gradient = torch.zeros_like(logits) if want_gradient else None
    for rows, cells, down in upsample.bands(len(logits)):
        across = upsample.across
        target = classes[rows]
        counted = target != UNCOUNTED
        target = target.clamp(min=0)[None]
        upsampled = down @ logits[:, cells] @ across.T
        if out is not None:
            upsampled.masked_fill_(out, -torch.inf)
        log_probability = upsampled.log_softmax(0)
        del upsampled
        total -= log_probability.gather(0, target)[0].masked_fill_(~counted, 0).sum()
        if gradient is not None:
            at_map = log_probability.exp_()
            at_map.scatter_(0, target, at_map.gather(0, target) - 1)
            gradient[:, cells] += down.T @ (at_map.mul_(counted.to(logits.dtype)) @ across)
    return total, gradient


class _Upsampling:
    """Bilinear upsampling [h,w] -> [H,W] as two matrices, a band of result rows at a time."""

    def __init__(self, cells: torch.Size, size: torch.Size, like: Tensor) -> None:
        self.cells, self.size, self.device = cells[0], size, like.device.type
        self.down = interpolation(cells[0], size[0], like)
        self.across = interpolation(cells[1], size[1], like)

    def bands(self, classes: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Result rows, the rows of cells they are made of, and the matrix between the two."""
        height, width = self.size
        band = max(1, _BAND_ELEMENTS[self.device] // (classes * width))
        for start in range(0, height, band):
            stop = min(start + band, height)
            # A cell more on both sides than the two that a pixel lies between: rounding must not lose one.
            first = max(0, start * self.cells // height - 2)
            last = min(self.cells, stop * self.cells // height + 3)
            yield slice(start, stop), slice(first, last), self.down[start:stop, first:last]
