"""From a MaskPrediction to classes, segments and instances: pure functions of prediction, size and thresholds.

Shapes: B images, Q queries, C channels, K classes, H W result, h w prediction resolution. The product of mask and
pixel embeddings is made for a band of result rows at a time, so that memory depends on a budget, not on K x H x W.
`extent` is everywhere the part of the [h,w] grid that holds the image, in cells (None: all of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mf_scale.evaluation.asked import hidden_classes
from mf_scale.evaluation.class_maximum import CLASSES_AT_ONCE, chunks, most_probable_class
from mf_scale.evaluation.masks import BUDGET_ELEMENTS, COPIES, Extent, FactoredMasks, mask_logit, packed
from mf_scale.models.outputs import MaskPrediction

Segments = list[dict[str, Any]]


@dataclass(frozen=True)
class Instances:
    """The instances of one image, best first; they may overlap."""

    labels: Tensor
    """Class of each, int64 [N]."""
    scores: Tensor
    """Class probability x mask quality, fp32 [N]."""
    mask_of: Tensor
    """Row of `masks` of each, int64 [N]: a query that is found with two classes has one mask."""
    masks: Tensor
    """uint8 [M,H,ceil(W/8)], eight pixels a byte, the first in the highest bit."""
    size: tuple[int, int]
    """H, W."""

    def __len__(self) -> int:
        return len(self.labels)

    def mask(self, i: int) -> NDArray[np.bool_]:
        """The mask of instance `i`, [H,W]."""
        return self.row(int(self.mask_of[i]))

    def row(self, row: int) -> NDArray[np.bool_]:
        """The mask in this row of `masks`, [H,W]."""
        return np.unpackbits(self.masks[row].cpu().numpy(), axis=-1, count=self.size[1]).astype(bool)


def semantic(
    prediction: MaskPrediction,
    size: tuple[int, int],
    *,
    extent: Extent = None,
    budget: int = BUDGET_ELEMENTS,
) -> Tensor:
    """Class of every pixel, int64 [B,H,W], by marginalisation over the queries (paper, equation 4).

    argmax over classes of sum over queries of p(class | query) * sigmoid(mask logit); no-object is left out before the
    sum, and the mask logits are upsampled before the argmax. `size` is (H, W). There is no threshold.
    """
    (images, queries), classes = prediction.mask_embeddings.shape[:2], prediction.classifier.classes
    result = torch.empty((images, *size), dtype=torch.int64, device=prediction.pixel_embeddings.device)
    hidden = hidden_classes(prediction)
    pixels = max(1, budget // (COPIES * queries + min(classes, CLASSES_AT_ONCE)))
    for image in range(images):
        likely_first = chunks(class_probabilities(prediction, image)[:, :-1], hidden)
        masks = FactoredMasks(prediction.mask_embeddings[image], prediction.pixel_embeddings[image], size, extent)
        for columns, strip in masks.strips(min(pixels, size[1])):
            for rows, logits in strip.bands(max(1, pixels // size[1])):
                result[image, rows, columns] = most_probable_class(likely_first, logits.sigmoid_())
    return result


def class_probabilities(prediction: MaskPrediction, image: int) -> Tensor:
    """fp32 [Q,K+1] of one image's queries; index K is no-object."""
    return prediction.classifier.logits(prediction.class_embeddings[image]).float().softmax(-1)


def panoptic(
    prediction: MaskPrediction,
    size: tuple[int, int],
    things: Sequence[bool],
    object_threshold: float,
    overlap_threshold: float,
    *,
    mask_threshold: float = 0.5,
    extent: Extent = None,
    budget: int = BUDGET_ELEMENTS,
) -> list[tuple[Tensor, Segments]]:
    """Segments of each image: (segment map int32 [H,W] with -1 for void, [{label, thing, score}] by map value).

    The paper's rules: a query stays if its class is an object with a probability above `object_threshold`; a pixel
    goes to the query with the largest probability x mask value; a query is dropped if less than `overlap_threshold`
    of its own mask (values >= `mask_threshold`) is left to it; segments of one stuff class are merged (score: the
    largest). The published configurations have 0.8, 0.8 and 0.5, and so has ours.
    """
    results = []
    for image in range(len(prediction.class_embeddings)):
        scores, labels = class_probabilities(prediction, image).max(-1)  # [Q]
        kept = (labels != prediction.classifier.classes) & (scores > object_threshold)
        scores, labels = scores[kept], labels[kept]
        masks = FactoredMasks(prediction.mask_embeddings[image][kept], prediction.pixel_embeddings[image], size, extent)
        owner, pixels = _owners(masks, scores, mask_logit(mask_threshold), budget)
        value_of, segments = _segments(labels.tolist(), scores.tolist(), pixels, things, overlap_threshold)
        results.append((torch.tensor([*value_of, -1], dtype=torch.int32, device=owner.device)[owner], segments))
    return results


def instance(
    prediction: MaskPrediction,
    size: tuple[int, int],
    things: Sequence[bool],
    top_k: int,
    score_threshold: float,
    *,
    mask_threshold: float = 0.5,
    extent: Extent = None,
    budget: int = BUDGET_ELEMENTS,
) -> list[Instances]:
    """Instances of each image: the `top_k` most probable (query, thing class) pairs, best score first.

    score = class probability (softmax with no-object) x mask quality, the mean probability inside the mask, which is
    where the upsampled mask has `mask_threshold` (0.5) or more; pairs with a lower score than `score_threshold`, masks
    without a pixel and classes without any probability (hidden ones) are dropped. The paper has no instance inference:
    the rule is Mask2Former's (Cheng et al. 2022), with its 100 pairs an image and no score threshold, as COCO's AP
    wants it. It drops stuff after it has taken the best pairs; here stuff takes no thing's place.
    """
    results = []
    kind = torch.tensor(list(things), dtype=torch.bool, device=prediction.class_embeddings.device).nonzero().flatten()
    for image in range(len(prediction.class_embeddings)):
        probabilities = class_probabilities(prediction, image)[:, kind].flatten()  # [Q x things]
        pairs = _most_probable(probabilities, top_k)
        likely = probabilities[pairs]
        pairs = pairs[(likely >= score_threshold) & (likely > 0)]  # no mask makes a score higher than this
        queries = pairs // max(1, len(kind))
        used, row = queries.unique(return_inverse=True)
        masks = FactoredMasks(prediction.mask_embeddings[image][used], prediction.pixel_embeddings[image], size, extent)
        bits, quality = _cut_masks(masks, mask_logit(mask_threshold), budget)
        scores = probabilities[pairs] * quality[row]
        order = scores.sort(descending=True, stable=True).indices
        order = order[(quality[row][order] > 0) & (scores[order] >= score_threshold)]
        left, mask_of = row[order].unique(return_inverse=True)
        labels = kind[pairs[order] % max(1, len(kind))]
        results.append(Instances(labels, scores[order], mask_of, bits[left], size))
    return results


def _most_probable(probabilities: Tensor, top_k: int) -> Tensor:
    """Where the `top_k` largest of [n] are, best first, of equal ones the first: as a stable sort of all would say.

    At 100 queries and 10,000 classes sorting all took 90 ms an image, this takes 4.
    """
    smallest = probabilities.topk(min(top_k, len(probabilities))).values[-1:]
    among = (probabilities >= smallest).nonzero().flatten()
    return among[probabilities[among].sort(descending=True, stable=True).indices[:top_k]]


def _cut_masks(masks: FactoredMasks, cut: float, budget: int) -> tuple[Tensor, Tensor]:
    """Masks where the logits reach `cut`, packed; the mean probability inside each, fp32 [N] (0 without a pixel)."""
    count, device = len(masks.embeddings), masks.pixels.device
    height, width = masks.size
    bits = torch.zeros((count, height, -(-width // 8)), dtype=torch.uint8, device=device)
    inside, total = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(2))
    if count:
        for rows, logits in masks.bands(max(1, budget // (width * (COPIES + 1) * count))):
            mask = logits >= cut
            bits[:, rows] = packed(mask)
            inside += mask.sum((1, 2))
            # Summed row by row first, so that a band's height does not enter the rounding.
            total += (logits.sigmoid_() * mask).sum(2).double().sum(1)
    return bits, (total / inside.clamp(min=1)).float()


def _owners(
    masks: FactoredMasks, scores: Tensor, cut: float, budget: int
) -> tuple[Tensor, tuple[list[int], list[int]]]:
    """The query of every pixel [H,W] (-1: none at all), and of each query its mask's pixels and those left to it.

    A mask is where its logits reach `cut`.
    """
    count, device = len(scores), scores.device
    owner = torch.full(masks.size, -1, dtype=torch.int64, device=device)
    own, left = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
    if count:
        for rows, logits in masks.bands(max(1, budget // (masks.size[1] * (COPIES + 1) * count))):
            own += (logits >= cut).flatten(1).sum(1)
            owner[rows] = (scores[:, None, None] * logits.sigmoid_()).argmax(0)
            left += owner[rows].flatten().bincount(minlength=count)
    return owner, (own.tolist(), left.tolist())


def _segments(
    labels: Sequence[int],
    scores: Sequence[float],
    pixels: tuple[Sequence[int], Sequence[int]],
    things: Sequence[bool],
    overlap_threshold: float,
) -> tuple[list[int], Segments]:
    """Map value of each kept query (-1: dropped) and the segments by map value; `pixels`: own and left, by query."""
    values: list[int] = []
    segments: Segments = []
    stuff: dict[int, int] = {}
    for label, score, own, left in zip(labels, scores, *pixels, strict=True):
        if not own or not left or left / own < overlap_threshold:
            values.append(-1)
            continue
        if label in stuff:
            values.append(stuff[label])
            segments[stuff[label]]["score"] = max(score, segments[stuff[label]]["score"])
            continue
        if not things[label]:
            stuff[label] = len(segments)
        values.append(len(segments))
        segments.append({"label": label, "thing": bool(things[label]), "score": score})
    return values, segments
