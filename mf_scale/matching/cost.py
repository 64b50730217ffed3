"""Pairwise matching cost of all layers and images, from one read of the logits and without gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import IGNORE, Batch
from mf_scale.kernels import triton_cost
from mf_scale.kernels.choose import choose_kernels
from mf_scale.kernels.class_rows import Logits, asked_classes
from mf_scale.kernels.native import BLOCK, PairSums
from mf_scale.kernels.targets import signed_map
from mf_scale.kernels.triton_cost import CostWeights
from mf_scale.matching.class_cost import class_probabilities
from mf_scale.models.outputs import LayerPrediction, MaskPrediction

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
def pairwise_cost(
    prediction: MaskPrediction,
    batch: Batch,
    matching: MatchingConfig,
    loss: LossConfig,
    stacked: LayerPrediction | None = None,
    logits: Logits | None = None,
) -> PairwiseCost:
    """Cost of every query for every segment at prediction resolution, in fp32 (fp64 for fp64 predictions).

    The map is downsampled to its nearest pixels. `loss` gives focal alpha and gamma, what ignored pixels are, and the
    kernels. `stacked` are the prediction's stacked layers where the caller has them already, `logits` its class logits
    in the making. Source: MaskFormer section
    3.3 and its code (cost weights as in the loss).
    """
    pixels = prediction.pixel_embeddings
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    kernels = choose_kernels(loss.kernels, pixels.device.type, dtype)
    with torch.autocast(pixels.device.type, enabled=False):
        stacked = stacked or prediction.stacked()
        asked = None if batch.class_mask is None else asked_classes(batch.class_mask, batch.labels)
        embeddings = stacked.class_embeddings.flatten(1, 2)
        probability = class_probabilities(embeddings, prediction.classifier, batch.labels, asked, logits)
        if kernels == "triton":
            return _fused_cost(probability, stacked, pixels, batch, matching, loss)
        return _cost_by_image(_BY_KERNEL[kernels], probability, stacked, pixels, batch, matching, loss)


def _fused_cost(
    probability: Tensor,
    stacked: LayerPrediction,
    pixels: Tensor,
    batch: Batch,
    matching: MatchingConfig,
    loss: LossConfig,
) -> PairwiseCost:
    """On a GPU: all images and layers at once; `probability` [B,S*Q,T] of each segment's class."""
    weights = CostWeights(
        matching.class_weight,
        matching.focal_weight,
        matching.dice_weight,
        loss.focal_alpha,
        loss.focal_gamma,
        loss.ignored_pixels == "exclude",
    )
    costs = triton_cost.pairwise_cost(
        probability,
        stacked.mask_embeddings.flatten(1, 2),
        pixels,
        batch.segment_map,
        batch.segment_layer,
        weights,
    )
    sizes = stacked.mask_embeddings.shape[1:3]
    return PairwiseCost(*(cost.unflatten(1, sizes) for cost in costs))


def _cost_by_image(
    mask_costs: Any,
    probability: Tensor,
    stacked: LayerPrediction,
    pixels: Tensor,
    batch: Batch,
    matching: MatchingConfig,
    loss: LossConfig,
) -> PairwiseCost:
    """All layers of one image after the other; `probability` [B,S*Q,T] of each segment's class."""
    dtype, T = torch.promote_types(pixels.dtype, torch.float32), batch.labels.shape[1]
    B, S, Q, _ = stacked.mask_embeddings.shape
    class_cost = probability.to(dtype).view(B, S, Q, T).neg()
    maps = downsample_nearest(batch.segment_map, (pixels.shape[2], pixels.shape[3])).flatten(2)
    focal, dice = torch.empty_like(class_cost), torch.empty_like(class_cost)
    for b in range(B):
        embeddings, features = stacked.mask_embeddings[b].flatten(0, 1).to(dtype), pixels[b].flatten(1).to(dtype)
        costs = mask_costs(embeddings, features, maps[b], batch.segment_layer[b], loss)
        focal[b], dice[b] = (cost.view(S, Q, T) for cost in costs)
    total = matching.class_weight * class_cost + matching.focal_weight * focal + matching.dice_weight * dice
    return PairwiseCost(class_cost, focal, dice, total)


def downsample_nearest(segment_map: Tensor, size: tuple[int, int]) -> Tensor:
    """segment_map [...,H,W] at `size`: pixel i reads pixel floor(i H / h), as torch's nearest interpolation does."""
    (height, width), (rows, columns) = segment_map.shape[-2:], size
    y = torch.arange(rows, device=segment_map.device) * height // rows
    x = torch.arange(columns, device=segment_map.device) * width // columns
    return segment_map[..., y[:, None], x]


def _eager_costs(
    embeddings: Tensor, features: Tensor, maps: Tensor, segment_layer: Tensor, loss: LossConfig
) -> tuple[Tensor, Tensor]:
    """Focal and dice cost [N,T] of queries [N,C] on pixels [C,hw] for the segments of maps [L,hw], in chunks."""
    masks, valid = _one_hot(maps, segment_layer, loss.ignored_pixels == "exclude", features.dtype)
    rows = max(1, _CHUNK_LOGITS[features.device.type] // features.shape[1])
    costs = [_mask_costs(part @ features, masks, valid, loss) for part in embeddings.split(rows)]
    focal, dice = (torch.cat(kind) for kind in zip(*costs, strict=True))
    return focal, dice


def _native_costs(
    embeddings: Tensor, features: Tensor, maps: Tensor, segment_layer: Tensor, loss: LossConfig
) -> tuple[Tensor, Tensor]:
    """The same on a CPU without one-hot masks: each pixel's terms are added to its own segment, pixels by pixels."""
    exclude, T = loss.ignored_pixels == "exclude", len(segment_layer)
    maps = signed_map(maps).contiguous()
    segment_layer = segment_layer.clamp(0, len(maps) - 1)
    sums = PairSums(len(embeddings), segment_layer, loss.focal_alpha, loss.focal_gamma, exclude)
    # With several threads a product's barriers cost more than a cache that is too small (2 threads: 3 times).
    chunk = _CHUNK_LOGITS["cpu"] * (8 if torch.get_num_threads() > 1 else 1)
    step = max(1, chunk // max(1, len(embeddings)) // BLOCK) * BLOCK  # cuts between blocks change no sum
    for start in range(0, features.shape[1], step):
        sums.add(features[:, start : start + step].T @ embeddings.T, maps, start)
    counted = maps[0] != IGNORE if exclude else torch.ones_like(maps[0], dtype=torch.bool)
    by_layer = [torch.bincount(layer[layer >= 0].long(), minlength=T)[:T] for layer in maps[:, counted]]
    sizes = torch.stack(by_layer).gather(0, segment_layer[None]).T
    focal = (sums.inside_focal + sums.outside) / counted.sum().clamp(min=1)
    dice = 1 - (2 * sums.inside_mass + 1) / (sums.mass + sizes + 1)
    return focal.T.float(), dice.T.float()


_BY_KERNEL = {"eager": _eager_costs, "native": _native_costs}


def _one_hot(layers: Tensor, segment_layer: Tensor, exclude: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Segment masks [hw,T] of one image's map [L,hw], and its pixels that count [hw,1] (None: all do)."""
    layers = signed_map(layers)
    index = torch.arange(len(segment_layer), device=layers.device)
    own_layer = layers if len(layers) == 1 else layers[segment_layer.clamp(0, len(layers) - 1)]
    masks = (own_layer == index[:, None]).T.to(dtype)
    if not exclude:
        return masks, None
    valid = (layers[0] != IGNORE)[:, None].to(dtype)
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
