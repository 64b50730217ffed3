"""The losses stated plainly, one pair and one image at a time on dense masks: the oracle of the fast paths.

Works in the dtype of its inputs (fp32 or fp64), differentiable by autograd. Source: MaskFormer section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import IGNORE, NO_LABEL, NOT_EXHAUSTIVE, UNKNOWN, Batch
from mf_scale.matching.hungarian import solve
from mf_scale.models.outputs import MaskPrediction, PixelPrediction


def dense_mask(segment_map: Tensor, layer: int, segment: int) -> Tensor:
    """Mask [H,W] of one segment from an image's map [L,H,W]."""
    return segment_map[layer] == segment


def counted_pixels(segment_map: Tensor, ignored_pixels: str) -> Tensor:
    """Pixels [H,W] that take part in the mask losses: all of them, or those that are not ignored."""
    everywhere = torch.ones_like(segment_map[0], dtype=torch.bool)
    return segment_map[0] != IGNORE if ignored_pixels == "exclude" else everywhere


def focal_loss(logits: Tensor, mask: Tensor, counted: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss of one mask [H,W], mean over the counted pixels (0 where none counts)."""
    target = mask.to(logits.dtype)
    probability = logits.sigmoid()
    of_target = probability * target + (1 - probability) * (1 - target)
    weight = alpha * target + (1 - alpha) * (1 - target)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    pixels = weight * (1 - of_target) ** gamma * cross_entropy
    return pixels[counted].sum() / counted.sum().clamp(min=1)


def dice_loss(logits: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """1 - (2 sum(s t) + 1) / (sum(s) + sum(t) + 1) over the counted pixels of one mask [H,W]."""
    s, t = logits.sigmoid()[counted], mask.to(logits.dtype)[counted]
    return 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)


def unknown_classes(batch: Batch, image: int) -> list[int]:
    """Classes of one image that count as neither right nor wrong: a class that is marked there is known."""
    if batch.class_mask is None:
        return []
    return [
        k for k in (batch.class_mask[image] == UNKNOWN).nonzero().flatten().tolist() if k not in batch.labels[image]
    ]


def without(class_logits: Tensor, classes: list[int]) -> Tensor:
    """Logits [.,K+1] with minus infinity for some classes."""
    out = torch.zeros_like(class_logits[..., :1].expand_as(class_logits), dtype=torch.bool)
    out[..., classes] = True
    return torch.where(out, torch.full_like(class_logits, -torch.inf), class_logits)


def asked_logits(class_logits: Tensor, targets: Tensor, batch: Batch, image: int) -> Tensor:
    """Logits [Q,K+1] of what a query is asked: unmatched ones nothing of classes that are not marked exhaustively."""
    class_logits = without(class_logits, unknown_classes(batch, image))
    if batch.class_mask is None:
        return class_logits
    not_exhaustive = (batch.class_mask[image] == NOT_EXHAUSTIVE).nonzero().flatten().tolist()
    matched = (targets < class_logits.shape[-1] - 1)[:, None]
    return torch.where(matched, class_logits, without(class_logits, not_exhaustive))


def class_loss(class_logits: Tensor, targets: Tensor, no_object_weight: float) -> Tensor:
    """Weighted sum over queries [Q,K+1] of the cross-entropy with their targets [Q]; the last class is no-object."""
    log_probability = class_logits.log_softmax(dim=-1)
    weight = class_logits.new_ones(class_logits.shape[-1])
    weight[-1] = no_object_weight
    return -(weight[targets] * log_probability[torch.arange(len(targets), device=targets.device), targets]).sum()


def matching_cost(
    class_logits: Tensor, mask_logits: Tensor, batch: Batch, image: int, matching: MatchingConfig, loss: LossConfig
) -> Tensor:
    """Cost [Q,T] of one layer's queries, logits [Q,K+1] and [Q,h,w], for one image of the batch."""
    segment_map = batch.segment_map[image]
    low = F.interpolate(segment_map[None].to(torch.float64), size=mask_logits.shape[-2:], mode="nearest")[0].long()
    counted = counted_pixels(low, loss.ignored_pixels)
    probability = without(class_logits, unknown_classes(batch, image)).softmax(dim=-1)
    rows = []
    for query in range(len(class_logits)):
        for segment in range(segment_count(batch, image)):
            mask = dense_mask(low, int(batch.segment_layer[image, segment]), segment)
            focal = focal_loss(mask_logits[query], mask, counted, loss.focal_alpha, loss.focal_gamma)
            dice = dice_loss(mask_logits[query], mask, counted)
            by_class = -probability[query, batch.labels[image, segment]]
            rows.append(matching.class_weight * by_class + matching.focal_weight * focal + matching.dice_weight * dice)
    return torch.stack(rows).view(len(class_logits), -1) if rows else class_logits.new_zeros(len(class_logits), 0)


def segment_count(batch: Batch, image: int) -> int:
    return int((batch.labels[image] != NO_LABEL).sum())


def reference_loss(
    prediction: MaskPrediction,
    batch: Batch,
    num_masks: float,
    class_weight: float,
    loss: LossConfig,
    matching: MatchingConfig,
    assign: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = solve,
) -> dict[str, Tensor]:
    """class, focal and dice of a batch, weighted, normalised and summed over layers.

    `assign` takes the cost [Q,T] of each layer and, within it, each image, and gives matched queries and segments.
    """
    size = batch.segment_map.shape[-2:]
    terms = {name: prediction.pixel_embeddings.new_zeros(()) for name in ("class", "focal", "dice")}
    for layer in prediction.layers():
        mask_logits = torch.einsum("bqc,bchw->bqhw", layer.mask_embeddings, prediction.pixel_embeddings)
        upsampled = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False)
        for image, segment_map in enumerate(batch.segment_map):
            class_logits = prediction.classifier.logits(layer.class_embeddings[image])
            cost = matching_cost(class_logits, mask_logits[image], batch, image, matching, loss)
            counted = counted_pixels(segment_map, loss.ignored_pixels)
            targets = torch.full((len(class_logits),), class_logits.shape[-1] - 1, device=cost.device)
            for query, segment in zip(*assign(cost.detach().cpu().numpy()), strict=True):
                targets[query] = batch.labels[image, segment]
                mask = dense_mask(segment_map, int(batch.segment_layer[image, segment]), int(segment))
                focal = focal_loss(upsampled[image, query], mask, counted, loss.focal_alpha, loss.focal_gamma)
                dice = dice_loss(upsampled[image, query], mask, counted)
                terms["focal"] = terms["focal"] + loss.focal_weight * focal / max(1.0, num_masks)
                terms["dice"] = terms["dice"] + loss.dice_weight * dice / max(1.0, num_masks)
            asked = asked_logits(class_logits, targets, batch, image)
            by_class = class_loss(asked, targets, loss.no_object_weight) / class_weight
            terms["class"] = terms["class"] + loss.class_weight * by_class
    return terms


def reference_pixel_loss(prediction: PixelPrediction, batch: Batch, pixels: float) -> Tensor:
    """Per-pixel cross-entropy of a batch over `pixels`, summed over layers: dense logits, a segment at a time.

    Classes that are unknown in an image are not in the softmax of its pixels. (NOT_EXHAUSTIVE is known: every counted
    pixel has a class.)
    """
    size = batch.segment_map.shape[-2:]
    total = prediction.pixel_embeddings.new_zeros(())
    for embeddings in (*prediction.aux, prediction.class_embeddings):
        logits = torch.einsum("bkc,bchw->bkhw", embeddings, prediction.pixel_embeddings)
        if prediction.bias is not None:
            logits = logits + prediction.bias[None, :, None, None]
        upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        for image, segment_map in enumerate(batch.segment_map[:, 0]):
            asked = without(upsampled[image].movedim(0, -1), unknown_classes(batch, image))
            for segment in range(segment_count(batch, image)):
                log_probability = asked.log_softmax(dim=-1)[..., batch.labels[image, segment]]
                total = total - log_probability[segment_map == segment].sum() / max(1.0, pixels)
    return total
