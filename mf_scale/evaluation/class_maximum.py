"""The most probable class of pixels among thousands: scores are made a chunk of classes at a time, and not all of them.

A class's score at a pixel is the sum over queries of p(class | query) * mask value: at most the class's largest
probability of any query times the sum of the pixel's mask values. So the classes are taken in the order of that largest
probability, and where the best score so far is above that bound at all pixels of a block, the rest is left out:
nothing of it could win. A trained model is sure of some classes an image; where it is sure of none, all are looked at.

Shapes: Q queries, K classes, n pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CLASSES_AT_ONCE = 256
_SCORES_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}
"""What stays in a CPU's cache until its maximum is taken; what fills a GPU."""
_ROUNDING = 1 + 1e-4
"""On the bound: of sums in fp32 over some hundred queries it is at most a tenth of that."""


class Chunk(NamedTuple):
    """Some classes, in the order of their labels."""

    weights: Tensor
    """[Q,k]: probability of each class, by query."""
    labels: Tensor
    """int64 [k]."""
    largest: Tensor
    """The largest of the weights, and no smaller than any of a later chunk."""


def chunks(weights: Tensor, hidden: Tensor | None = None) -> list[Chunk]:
    """Weights [Q,K] by the classes' largest probabilities, the likely classes first.

    The `hidden` classes, bool [K], are in no chunk: else one could win where all scores are 0. If all are, none is.
    """
    largest, by_largest = weights.amax(0).sort(descending=True, stable=True)
    if hidden is not None and not bool(hidden.all()):
        shown = ~hidden[by_largest]
        largest, by_largest = largest[shown], by_largest[shown]
    parts = zip(largest.split(CLASSES_AT_ONCE), by_largest.split(CLASSES_AT_ONCE), strict=True)
    found = []
    for of_part, ordered in parts:
        labels = ordered.sort().values  # of equal scores the lowest class wins, as it does in one argmax of all
        found.append(Chunk(weights[:, labels], labels, of_part[0]))
    return found


def most_probable_class(classes: Sequence[Chunk], masks: Tensor) -> Tensor:
    """argmax over K of weights [Q,K]^T @ masks [Q,r,W] -> int64 [r,W].

    Pixels are the product's rows, so that a maximum is taken along memory: on a CPU with all classes looked at five
    times as fast at K = 10,000 as across it, two times at 150.
    """
    pixels = masks.flatten(1).T
    block = max(1, _SCORES_AT_ONCE.get(masks.device.type, _SCORES_AT_ONCE["cpu"]) // len(classes[0].labels))
    found = [_best(pixels[start : start + block], classes) for start in range(0, len(pixels), block)]
    return torch.cat(found).view(masks.shape[1:])


def _best(pixels: Tensor, classes: Sequence[Chunk]) -> Tensor:
    """argmax over all classes for pixels [n,Q], with a running maximum; of equal scores the lowest class wins."""
    mass = pixels.sum(1).mul_(_ROUNDING)
    best, label = _of_chunk(pixels, classes[0])
    for chunk in classes[1:]:
        if not bool((mass * chunk.largest >= best).any()):
            break
        score, other = _of_chunk(pixels, chunk)
        better = (score > best) | ((score == best) & (other < label))
        best, label = torch.where(better, score, best), torch.where(better, other, label)
    return label


def _of_chunk(pixels: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    score, place = (pixels @ chunk.weights).max(1)
    return score, chunk.labels[place]
