"""Focal and dice loss of matched pairs at full resolution, in one pass, the gradient made in the forward.

What is kept for backward is one gradient at prediction resolution; nothing of the map's resolution is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mf_scale.config.schema import LossConfig
from mf_scale.kernels import mask_loss as operator
from mf_scale.kernels.choose import choose_kernels
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
    logits: Tensor, segment_map: Tensor, segments: Tensor, layers: Tensor, counts: Tensor, config: LossConfig
) -> MaskLoss:
    """Compare upsampled logits with segments of the map.

    `logits` [B,P,h,w] of the pairs, `segment_map` [B,L,H,W], `segments` and `layers` [B,P] the index and map layer of
    each pair's segment, `counts` [B] the real pairs of each image (the rest of its row is padding).
    Source: MaskFormer section 3.3; sigmoid focal loss and dice with +1 smoothing as in its code; bilinear upsampling
    with align_corners False. With `config.points` the losses are taken at so many sampled points of each mask.
    """
    if config.points:
        focal, dice = point_losses(logits, segment_map, segments, layers, counts, config)
        total = config.focal_weight * focal.sum() + config.dice_weight * dice.sum()
        return MaskLoss(total, focal.detach(), dice.detach())
    total, focal, dice, _ = operator.mask_loss(
        logits,
        segment_map,
        segments,
        layers,
        counts,
        config.focal_weight,
        config.dice_weight,
        config.focal_alpha,
        config.focal_gamma,
        config.ignored_pixels == "exclude",
        choose_kernels(config.kernels, logits.device.type, logits.dtype),
        logits.requires_grad and torch.is_grad_enabled(),
    )
    return MaskLoss(total, focal.detach(), dice.detach())
