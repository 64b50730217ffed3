"""Pairwise matching cost of all layers and images, from one read of the logits and without gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import IGNORE, Batch
from mf_scale.models.outputs import MaskPrediction

_CHUNK_LOGITS = {"cpu": 2**18, "cuda": 2**26}
"""Logits of an image worked on at once: what stays in a CPU's cache, what fills a GPU."""


@dataclass(frozen=True)
class PairwiseCost:
    """Costs [B,S,Q,T]; columns behind an image's last segment mean nothing."""

    class_cost: Tensor
    """Minus the probability of the segment's class."""
    focal: Tensor
    """Sigmoid focal loss of the query's mask for the segment, mean over pixels."""
    dice: Tensor
    """Dice loss of the query's mask for the segment."""
    total: Tensor
    """The three, weighted and summed."""


@torch.no_grad()
def pairwise_cost(prediction: MaskPrediction, batch: Batch, matching: MatchingConfig, loss: LossConfig) -> PairwiseCost:
    """Cost of every query for every segment at prediction resolution, in fp32 (fp64 for fp64 predictions).

    The map is downsampled to its nearest pixels. `loss` gives focal alpha and gamma and what ignored pixels are.
    Source: MaskFormer section 3.3 and its code (cost weights as in the loss).
    """
    pixels, T = prediction.pixel_embeddings, batch.labels.shape[1]
    wide = torch.promote_types(pixels.dtype, torch.float32)
    with torch.autocast(pixels.device.type, enabled=False):
        stacked = prediction.stacked()
        B, S, Q, _ = stacked.class_logits.shape
        labels = batch.labels.clamp(min=0)[:, None, None].expand(B, S, Q, T)
        class_cost = -stacked.class_logits.to(wide).softmax(dim=-1).gather(3, labels)
        maps = downsample_nearest(batch.segment_map, (pixels.shape[2], pixels.shape[3]))
        focal, dice = torch.empty_like(class_cost), torch.empty_like(class_cost)
        for b in range(B):
            embeddings, features = stacked.mask_embeddings[b].flatten(0, 1).to(wide), pixels[b].flatten(1).to(wide)
            masks, valid = _one_hot(maps[b], batch.segment_layer[b], loss.ignored_pixels == "exclude", wide)
            rows = max(1, _CHUNK_LOGITS[pixels.device.type] // features.shape[1])
            costs = [_mask_costs(part @ features, masks, valid, loss) for part in embeddings.split(rows)]
            focal[b], dice[b] = (torch.cat(kind).view(S, Q, T) for kind in zip(*costs, strict=True))
        total = matching.class_weight * class_cost + matching.focal_weight * focal + matching.dice_weight * dice
    return PairwiseCost(class_cost, focal, dice, total)


def downsample_nearest(segment_map: Tensor, size: tuple[int, int]) -> Tensor:
    """segment_map [...,H,W] at `size`: pixel i reads pixel floor(i H / h), as torch's nearest interpolation does."""
    (height, width), (rows, columns) = segment_map.shape[-2:], size
    y = torch.arange(rows, device=segment_map.device) * height // rows
    x = torch.arange(columns, device=segment_map.device) * width // columns
    return segment_map[..., y[:, None], x]


def _one_hot(layers: Tensor, segment_layer: Tensor, exclude: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Segment masks [hw,T] of one image's map [L,h,w], and its pixels that count [hw,1] (None: all do)."""
    index = torch.arange(len(segment_layer), device=layers.device)
    own_layer = layers if len(layers) == 1 else layers[segment_layer.clamp(min=0)]
    masks = (own_layer == index[:, None, None]).flatten(1).T.to(dtype)
    if not exclude:
        return masks, None
    valid = (layers[0] != IGNORE).flatten()[:, None].to(dtype)
    return masks * valid, valid


def _mask_costs(logits: Tensor, masks: Tensor, valid: Tensor | None, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """Focal and dice cost [N,T] of logits [N,hw] for masks [hw,T].

    With the focal terms f1 and f0 of a pixel for target 1 and 0, a mask's sum is f1 inside and f0 outside:
    (f1 - f0) masks + rowsum(f0). Dice needs sigmoid(logits) masks and two sums. The two products are made as one.
    """
    probability, cross_entropy_0 = logits.sigmoid(), F.softplus(logits)
    cross_entropy_1 = cross_entropy_0 - logits
    focal_1 = loss.focal_alpha * (1 - probability) ** loss.focal_gamma * cross_entropy_1
    focal_0 = (1 - loss.focal_alpha) * probability**loss.focal_gamma * cross_entropy_0
    inside = torch.cat((focal_1 - focal_0, probability)) @ masks
    if valid is None:
        outside, mass, pixels = focal_0.sum(1, keepdim=True), probability.sum(1, keepdim=True), logits.shape[1]
    else:
        outside, mass = (torch.cat((focal_0, probability)) @ valid).chunk(2)
        pixels = valid.sum().clamp(min=1)  # type: ignore[assignment]
    inside_focal, inside_mass = inside.chunk(2)
    focal = (inside_focal + outside) / pixels
    dice = 1 - (2 * inside_mass + 1) / (mass + masks.sum(0) + 1)
    return focal, dice
