"""From a MaskPrediction to classes and segments: the paper's semantic and panoptic inference (section 3.4).

Shapes: B images, Q queries, C channels, K classes, H W result, h w prediction resolution. The product of mask and
pixel embeddings is made for a band of result rows at a time, so that memory depends on a budget, not on K x H x W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mf_scale.models.outputs import MaskPrediction

BUDGET_ELEMENTS = 16 * 2**20
"""fp32 values alive at once for one band of result rows (64 MiB)."""
_COPIES = 4
"""Arrays of the size of a band's mask logits that interpolation keeps alive at once."""

Segments = list[dict[str, Any]]


def semantic(
    prediction: MaskPrediction,
    size: tuple[int, int],
    *,
    extent: tuple[float, float] | None = None,
    budget: int = BUDGET_ELEMENTS,
) -> Tensor:
    """Class of every pixel, int64 [B,H,W], by marginalisation over the queries (paper, equation 4).

    argmax over classes of sum over queries of p(class | query) * sigmoid(mask logit); no-object is left out before the
    sum, and the mask logits are upsampled before the argmax. `size` is (H, W); `extent` is the part of the [h,w] grid
    that holds the image, in cells (None: all of it).
    """
    probabilities = prediction.class_logits.float().softmax(-1)[..., :-1]  # [B,Q,K]
    queries, classes = probabilities.shape[1:]
    result = torch.empty((len(probabilities), *size), dtype=torch.int64, device=probabilities.device)
    class_chunk = max(1, min(classes, budget // size[1] - _COPIES * queries))
    band = max(1, budget // (size[1] * (_COPIES * queries + class_chunk)))
    for image, weights in enumerate(probabilities):
        masks = _Masks(prediction.mask_embeddings[image], prediction.pixel_embeddings[image], size, extent)
        for rows, logits in masks.bands(band):
            result[image, rows] = _most_probable_class(weights, logits.sigmoid_(), class_chunk)
    return result


def panoptic(
    prediction: MaskPrediction,
    size: tuple[int, int],
    things: Sequence[bool],
    object_threshold: float,
    overlap_threshold: float,
    *,
    extent: tuple[float, float] | None = None,
    budget: int = BUDGET_ELEMENTS,
) -> list[tuple[Tensor, Segments]]:
    """Segments of each image: (segment map int32 [H,W] with -1 for void, [{label, thing, score}] by map value).

    The paper's rules: a query stays if its class is an object with a probability above `object_threshold`; a pixel
    goes to the query with the largest probability x mask value; a query is dropped if less than `overlap_threshold`
    of its own mask (values >= 0.5) is left to it; segments of one stuff class are merged (score: the largest).
    """
    results = []
    for image, class_logits in enumerate(prediction.class_logits.float()):
        scores, labels = class_logits.softmax(-1).max(-1)  # [Q]
        kept = (labels != class_logits.shape[-1] - 1) & (scores > object_threshold)
        scores, labels = scores[kept], labels[kept]
        masks = _Masks(prediction.mask_embeddings[image][kept], prediction.pixel_embeddings[image], size, extent)
        owner, pixels = _owners(masks, scores, budget)
        value_of, segments = _segments(labels.tolist(), scores.tolist(), pixels, things, overlap_threshold)
        results.append((torch.tensor([*value_of, -1], dtype=torch.int32, device=owner.device)[owner], segments))
    return results


def _owners(masks: _Masks, scores: Tensor, budget: int) -> tuple[Tensor, tuple[list[int], list[int]]]:
    """The query of every pixel [H,W] (-1: none at all), and of each query its mask's pixels and those left to it."""
    count, device = len(scores), scores.device
    owner = torch.full(masks.size, -1, dtype=torch.int64, device=device)
    own, left = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
    if count:
        for rows, logits in masks.bands(max(1, budget // (masks.size[1] * (_COPIES + 1) * count))):
            own += (logits >= 0).flatten(1).sum(1)  # sigmoid >= 0.5
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


def _most_probable_class(weights: Tensor, masks: Tensor, class_chunk: int) -> Tensor:
    """argmax over K of weights [Q,K]^T @ masks [Q,r,W], a chunk of classes at a time with a running maximum."""
    flat = masks.flatten(1)
    best = best_class = None
    for start in range(0, weights.shape[1], class_chunk):
        score, label = (weights[:, start : start + class_chunk].T @ flat).max(0)
        label += start
        if best is None or best_class is None:
            best, best_class = score, label
            continue
        better = score > best
        best, best_class = torch.where(better, score, best), torch.where(better, label, best_class)
    assert best_class is not None, "there is at least one class"
    return best_class.view(masks.shape[1:])


@dataclass(frozen=True)
class _Masks:
    """The masks of one image, still factored, and the size they are wanted in."""

    embeddings: Tensor
    """[Q,C]."""
    pixels: Tensor
    """[C,h,w]."""
    size: tuple[int, int]
    """H, W."""
    extent: tuple[float, float] | None
    """Part of the [h,w] grid that holds the image, in cells."""

    def bands(self, band: int) -> Iterator[tuple[slice, Tensor]]:
        """Mask logits at the wanted size, `band` rows at a time: (rows, fp32 [Q,r,W])."""
        embeddings, pixels = self.embeddings.float(), self.pixels.float()
        cells = pixels.shape[-2:]
        extent = self.extent or (float(cells[0]), float(cells[1]))
        top, bottom, down = _bilinear(self.size[0], cells[0], extent[0], pixels.device)
        left, right, across = _bilinear(self.size[1], cells[1], extent[1], pixels.device)
        first_cell, last_cell = top.tolist(), bottom.tolist()
        for start in range(0, self.size[0], band):
            rows = slice(start, min(start + band, self.size[0]))
            first, last = first_cell[start], last_cell[rows.stop - 1]
            coarse = torch.einsum("qc,chw->qhw", embeddings, pixels[:, first : last + 1])
            coarse = torch.lerp(coarse[..., left], coarse[..., right], across)
            yield rows, torch.lerp(coarse[:, top[rows] - first], coarse[:, bottom[rows] - first], down[rows, None])


def _bilinear(size: int, cells: int, extent: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower cell, upper cell and weight of the upper one for each of `size` pixels spread over `extent` of the cells.

    Pixel centres at halves (align_corners=False), clamped to the grid.
    """
    centre = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * (extent / size) - 0.5
    centre = centre.clamp(0, cells - 1)
    lower = centre.floor()
    weight = (centre - lower).float()
    lower_cell = lower.long()
    return lower_cell, (lower_cell + 1).clamp(max=cells - 1), weight
