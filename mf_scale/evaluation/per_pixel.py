"""From a PixelPrediction to classes: the most probable class of every pixel. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from mf_scale.evaluation.asked import hidden_classes
from mf_scale.evaluation.masks import BUDGET_ELEMENTS, COPIES, Extent, FactoredMasks
from mf_scale.models.outputs import PixelPrediction


@torch.no_grad()  # a classifier's rows are parameters
def per_pixel_semantic(
    prediction: PixelPrediction, size: tuple[int, int], *, extent: Extent = None, budget: int = BUDGET_ELEMENTS
) -> Tensor:
    """Class of every pixel, int64 [B,H,W]: argmax over the classes of the upsampled logits.

    `size` is (H, W). A chunk of classes and a band of rows at a time, with a running maximum: memory is the budget's,
    not K x H x W. Of equal logits the lowest class wins, of NaN and numbers NaN, as in one argmax of all.
    """
    images, classes = prediction.class_embeddings.shape[:2]
    device, hidden = prediction.pixel_embeddings.device, hidden_classes(prediction)
    chunk = max(1, min(classes, budget // (size[1] * COPIES)))
    band = max(1, budget // (size[1] * COPIES * chunk))
    best = torch.full((images, *size), -torch.inf, device=device)
    result = torch.zeros((images, *size), dtype=torch.int64, device=device)
    for image, pixels in enumerate(prediction.pixel_embeddings):
        for start in range(0, classes, chunk):
            part = slice(start, start + chunk)
            maps = FactoredMasks(prediction.class_embeddings[image, part], pixels, size, extent)
            for rows, logits in maps.bands(band):
                if prediction.bias is not None:
                    logits.add_(prediction.bias[part, None, None].float())
                if hidden is not None:
                    logits[hidden[part]] = -torch.inf  # not even where all logits are NaN
                score, label = logits.max(0)
                before = best[image, rows]
                better = (score > before) | (score.isnan() & ~before.isnan())
                best[image, rows] = torch.where(better, score, before)
                result[image, rows] = torch.where(better, label + start, result[image, rows])
    return result
