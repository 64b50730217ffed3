"""Focal and dice loss of matched pairs at full resolution, in one pass, the gradient made in the forward.

What is kept for backward is one gradient at prediction resolution; nothing of the map's resolution is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mf_scale.config.schema import LossConfig
from mf_scale.kernels import mask_loss as operator
from mf_scale.kernels.choose import choose_kernels
from mf_scale.kernels.mask_loss import wide, wide_dtype
from mf_scale.losses.point_loss import point_losses


class MaskLoss(NamedTuple):
    """Losses of the matched pairs, unnormalised."""

    total: Tensor
    """Scalar, differentiable: focal and dice weighted and summed over all pairs."""
    focal: Tensor
    """[B,P], detached: mean over pixels of the sigmoid focal loss of each pair; 0 for padding."""
    dice: Tensor
    """[B,P], detached; 0 for padding."""


def mask_loss(
    mask_embeddings: Tensor,
    pixel_embeddings: Tensor,
    segment_map: Tensor,
    segments: Tensor,
    layers: Tensor,
    counts: Tensor,
    config: LossConfig,
    keys: Sequence[str],
) -> MaskLoss:
    """Compare the upsampled masks of the pairs with segments of the map.

    `mask_embeddings` [B,P,C] of the pairs, `pixel_embeddings` [B,C,h,w], `segment_map` [B,L,H,W], `segments` and
    `layers` [B,P] the index and map layer of each pair's segment, `counts` [B] the real pairs of each image (the rest
    of its row is padding). Source: MaskFormer section 3.3; sigmoid focal loss and dice with +1 smoothing as in its
    code; bilinear upsampling with align_corners False. With `config.points` the losses are taken at so many sampled
    points of each mask, which depend on torch's seed and on the image's own of the `keys`.
    """
    if config.points:
        logits = torch.einsum("bpc,bchw->bphw", wide(mask_embeddings), wide(pixel_embeddings))
        focal, dice = point_losses(logits, segment_map, segments, layers, counts, config, keys)
        total = config.focal_weight * focal.sum() + config.dice_weight * dice.sum()
        return MaskLoss(total, focal.detach(), dice.detach())
    trained = mask_embeddings.requires_grad or pixel_embeddings.requires_grad
    total, focal, dice, _ = operator.mask_loss(
        mask_embeddings,
        pixel_embeddings,
        segment_map,
        segments,
        layers,
        counts,
        config.focal_weight,
        config.dice_weight,
        config.focal_alpha,
        config.focal_gamma,
        config.ignored_pixels == "exclude",
        choose_kernels(config.kernels, pixel_embeddings.device.type, wide_dtype(pixel_embeddings)),
        trained and torch.is_grad_enabled(),
    )
    return MaskLoss(total, focal.detach(), dice.detach())
