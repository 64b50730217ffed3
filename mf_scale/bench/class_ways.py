"""What grows with the number of classes, made in our way and in the dense one: a step's class terms, inference.

Shapes: B images, R rows (the queries of all layers) an image, W width, T segments, K classes, H W the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.evaluation.inference import semantic
from mf_scale.kernels.class_rows import Logits
from mf_scale.losses.class_loss import class_loss
from mf_scale.matching.class_cost import class_probabilities
from mf_scale.models.outputs import Classifier, MaskPrediction

NO_OBJECT_WEIGHT = 0.1
_SURE = 16.0
"""Logit of a query's own class; the others' have a spread of about 1."""


@dataclass(frozen=True)
class Sizes:
    """What is measured, for each number of classes."""

    images: int = 16
    """Of a training step."""
    layers: int = 6
    queries: int = 100
    segments: int = 20
    """Of a training image."""
    width: int = 256
    """Of class, mask and pixel embeddings."""
    size: int = 512
    """H and W of the image that is segmented; its masks have a quarter."""
    budget: int = 64
    """MiB, as eval.memory_budget."""


@dataclass(frozen=True)
class Way:
    """Two ways to one result, and what the dense one has to keep."""

    name: str
    ours: Callable[[], Any]
    dense: Callable[[], Any]
    dense_bytes: int
    """At the least."""
    differences: Callable[[Any, Any], dict[str, float]]
    """Of our result to the dense one, by name."""


def class_terms(sizes: Sizes, classes: int, device: torch.device) -> Way:
    """Class cost, class loss and their gradients, of all layers and images of a step, from the embeddings."""
    generator = torch.Generator().manual_seed(classes)

    def leaf(*shape: int) -> Tensor:
        made = (torch.randn(shape, generator=generator) / sizes.width**0.25).to(device).requires_grad_()
        made.grad = torch.zeros_like(made)  # gradients stand from the second step on: they are inputs, not measured
        return made

    rows = sizes.layers * sizes.queries
    embeddings = leaf(sizes.images, rows, sizes.width)
    classifier = Classifier(leaf(classes + 1, sizes.width), leaf(classes + 1))
    labels = torch.randint(0, classes, (sizes.images, sizes.segments), generator=generator).to(device)
    targets = torch.full((sizes.images, rows), classes, device=device)
    matched = torch.arange(min(sizes.segments, sizes.queries), device=device)
    for layer in range(sizes.layers):
        targets[:, layer * sizes.queries + matched] = labels[:, matched]
    weights = torch.ones(classes + 1, device=device)
    weights[-1] = NO_OBJECT_WEIGHT
    given = [t for t in (embeddings, classifier.weight, classifier.bias) if t is not None]

    def ended(cost: Tensor, total: Tensor) -> dict[str, Any]:
        for tensor in given:
            tensor.grad.zero_()  # type: ignore[union-attr]  # it stands
        total.backward()
        return {"cost": cost, "loss": total.detach(), "gradients": [tensor.grad for tensor in given]}

    def ours() -> dict[str, Any]:
        logits = Logits(embeddings.detach(), Classifier(*(t.detach() for t in given[1:])))
        cost = class_probabilities(embeddings.detach(), classifier, labels, None, logits)
        total, _ = class_loss(embeddings, classifier, targets, weights, made=logits.taken())
        return ended(cost, total)

    def dense() -> dict[str, Any]:
        logits = classifier.logits(embeddings)
        with torch.no_grad():
            cost = logits.softmax(-1).gather(2, labels[:, None].expand(-1, rows, -1))
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weights, reduction="sum")
        return ended(cost, total)

    logits_bytes = 4 * sizes.images * rows * (classes + 1)
    return Way("class terms", ours, dense, 3 * logits_bytes, _class_differences)


def inference(sizes: Sizes, classes: int, device: torch.device) -> Way:
    """Semantic inference of one image by a model that is sure of nothing, so that every class has to be looked at."""
    return _inference("inference", False, sizes, classes, device)


def inference_sure(sizes: Sizes, classes: int, device: torch.device) -> Way:
    """The same where each query is sure of a class, or of no-object, as after training."""
    return _inference("inference, sure", True, sizes, classes, device)


def _inference(name: str, sure: bool, sizes: Sizes, classes: int, device: torch.device) -> Way:
    generator = torch.Generator().manual_seed(classes)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device)

    cells, result = -(-sizes.size // 4), (sizes.size, sizes.size)
    rows = normal(classes + 1, sizes.width, scale=1 / sizes.width**0.5)
    own = torch.randint(0, classes, (sizes.queries,), generator=generator)
    own[::2] = classes
    queries = _SURE * rows[own.to(device)] if sure else normal(sizes.queries, sizes.width, scale=0.1)
    masks = normal(1, sizes.queries, sizes.width, scale=3 / sizes.width**0.5)
    pixels = normal(1, sizes.width, cells, cells)
    prediction = MaskPrediction(queries[None], masks, pixels, Classifier(rows))

    def ours() -> Tensor:
        with torch.inference_mode():
            return semantic(prediction, result, budget=sizes.budget * 2**20 // 4)[0]

    def dense() -> Tensor:
        with torch.inference_mode():
            weights = prediction.class_logits[0].softmax(-1)[:, :-1]
            masks = torch.einsum("qc,chw->qhw", prediction.mask_embeddings[0], prediction.pixel_embeddings[0])
            masks = F.interpolate(masks[None], size=result, mode="bilinear", align_corners=False)[0].sigmoid()
            return torch.einsum("qk,qhw->khw", weights, masks).argmax(0)

    dense_bytes = 4 * sizes.size**2 * (classes + 2 * sizes.queries)
    return Way(name, ours, dense, dense_bytes, _pixel_differences)


def _class_differences(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """Relative, of the loss; the largest of a cost or gradient over that tensor's maximum."""
    loss = abs(float(ours["loss"] / dense["loss"]) - 1)
    pairs = zip([ours["cost"], *ours["gradients"]], [dense["cost"], *dense["gradients"]], strict=True)
    return {"loss": loss, "gradients": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)}


def _pixel_differences(ours: Tensor, dense: Tensor) -> dict[str, float]:
    """The share of pixels with another class; where two scores differ by rounding alone, either may win."""
    return {"pixels": float((ours != dense).float().mean())}
