"""Several views of an image -> class of every pixel, by averaging the scores of its classes.

Shapes: Q queries, K classes, H W result, r rows of a band. Scores are made for a band of rows and a chunk of classes
at a time: memory is the budget's, not K x H x W x views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mf_scale.evaluation.asked import hidden_classes
from mf_scale.evaluation.inference import class_probabilities
from mf_scale.evaluation.masks import BUDGET_ELEMENTS, COPIES, FactoredMasks, bands
from mf_scale.evaluation.views import View
from mf_scale.models.outputs import MaskPrediction, PixelPrediction

Scores = Callable[[slice, slice], Tensor]
"""(result rows, classes) -> scores [k,r,w] of a view, w the columns it covers, in its own direction."""
_SUMS = 4
"""Sums of class scores alive at once: of all scales, of one, of one direction, and what is added to it."""


@torch.no_grad()
def averaged_semantic(
    scales: Sequence[Sequence[View]], size: tuple[int, int], *, budget: int = BUDGET_ELEMENTS
) -> Tensor:
    """Class of every pixel, int64 [H,W]: argmax over the classes of the mean score over scales and directions.

    The score of a class is what `semantic` maximises, sum over queries of p(class | query) * sigmoid(mask logit)
    (MaskFormer's own test-time augmentation averages these), or a per-pixel model's softmax probability; both at the
    result's pixels. Windows of one scale and direction are averaged first, where they overlap. The two directions are
    added before the scales, so that a mirrored image gives the mirrored result, bit for bit. Scores of NaN, of a model
    that diverged, have a class too, always the same.
    """
    prediction = scales[0][0].prediction
    queries, classes = _extent_of_classes(prediction)
    device = prediction.pixel_embeddings.device
    chunk = max(1, min(classes, (budget // size[1] - COPIES * queries) // _SUMS))
    band = max(1, budget // (size[1] * (COPIES * queries + _SUMS * chunk)))
    makers = [[(view, _scores(view, size, chunk)) for view in views] for views in scales]
    hidden = hidden_classes(prediction)
    result = torch.zeros(size, dtype=torch.int64, device=device)
    for rows in bands(size[0], band):
        best = torch.full((rows.stop - rows.start, size[1]), -torch.inf, device=device)
        for start in range(0, classes, chunk):
            part = slice(start, min(start + chunk, classes))
            total = _of_scale(makers[0], rows, part, size[1])
            for views in makers[1:]:
                total += _of_scale(views, rows, part, size[1])
            if hidden is not None:
                total[hidden[part]] = -torch.inf  # not even where all scores are 0
            score, label = total.max(0)
            better = (score > best) | (score.isnan() & ~best.isnan())  # as one argmax of all scores has it
            best = torch.where(better, score, best)
            result[rows] = torch.where(better, label + start, result[rows])
    return result


def _of_scale(views: Sequence[tuple[View, Scores]], rows: slice, classes: slice, width: int) -> Tensor:
    """Scores of one scale [k,r,W]: of the upright views, plus those of the mirrored ones turned back."""
    upright = [pair for pair in views if not pair[0].flipped]
    mirrored = [pair for pair in views if pair[0].flipped]
    total = _of_direction(upright, rows, classes, width)
    if mirrored:
        total = total + _of_direction(mirrored, rows, classes, width).flip(-1)
    return total


def _of_direction(views: Sequence[tuple[View, Scores]], rows: slice, classes: slice, width: int) -> Tensor:
    """Mean over the windows that cover a pixel, [k,r,W]."""
    if len(views) == 1 and views[0][0].part is None:
        return views[0][1](rows, classes)
    device = views[0][0].prediction.pixel_embeddings.device
    total = torch.zeros((classes.stop - classes.start, rows.stop - rows.start, width), device=device)
    count = torch.zeros(total.shape[1:], device=device)
    for view, scores in views:
        assert view.part is not None, "a view without a part stands alone"
        covered = slice(max(rows.start, view.part.rows.start), min(rows.stop, view.part.rows.stop))
        if covered.start < covered.stop:
            here = slice(covered.start - rows.start, covered.stop - rows.start)
            total[:, here, view.part.columns] += scores(covered, classes)
            count[here, view.part.columns] += 1
    return total.div_(count)


def _extent_of_classes(prediction: MaskPrediction | PixelPrediction) -> tuple[int, int]:
    """Maps that a band of scores is made from (queries; none beside the classes themselves), and K."""
    if isinstance(prediction, MaskPrediction):
        return prediction.mask_embeddings.shape[1], prediction.classifier.classes
    return 0, prediction.class_embeddings.shape[1]


def _scores(view: View, size: tuple[int, int], chunk: int) -> Scores:
    if isinstance(view.prediction, MaskPrediction):
        return _mask_scores(view.prediction, view, size)
    return _pixel_scores(view.prediction, view, size, chunk)


def _mask_scores(prediction: MaskPrediction, view: View, size: tuple[int, int]) -> Scores:
    weights = class_probabilities(prediction, 0)[:, :-1]
    masks = FactoredMasks(prediction.mask_embeddings[0], prediction.pixel_embeddings[0], size, view.extent, view.part)
    rows_at = masks.resized()

    def scores(rows: slice, classes: slice) -> Tensor:
        probabilities = rows_at(rows).sigmoid_()  # [Q,r,w]
        flat = weights[:, classes].T @ probabilities.flatten(1)
        return flat.unflatten(1, tuple(probabilities.shape[1:]))

    return scores


def _pixel_scores(prediction: PixelPrediction, view: View, size: tuple[int, int], chunk: int) -> Scores:
    embeddings, pixels, bias = prediction.class_embeddings[0], prediction.pixel_embeddings[0], prediction.bias
    parts = [slice(start, min(start + chunk, len(embeddings))) for start in range(0, len(embeddings), chunk)]
    made: tuple[slice, Tensor] | None = None

    def logits(rows: slice, classes: slice) -> Tensor:
        values = FactoredMasks(embeddings[classes], pixels, size, view.extent, view.part).resized()(rows)
        return values if bias is None else values.add_(bias[classes, None, None].float())

    def scores(rows: slice, classes: slice) -> Tensor:
        nonlocal made
        if len(parts) == 1:
            return logits(rows, classes).softmax(0)
        if made is None or made[0] != rows:  # the same for all chunks of a band
            made = rows, torch.stack([logits(rows, part).logsumexp(0) for part in parts]).logsumexp(0)
        return logits(rows, classes).sub_(made[1]).exp_()

    return scores
