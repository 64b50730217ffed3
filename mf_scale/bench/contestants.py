"""The losses that are measured: ours by each kernel, the plain reference, and the peer when it is installed.

Every one starts from the embeddings, matches, and can be taken backward to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import NO_LABEL, Batch
from mf_scale.kernels.choose import KERNELS, why_not
from mf_scale.losses.criterion import Criterion
from mf_scale.losses.reference import reference_loss
from mf_scale.matching.cost import PairwiseCost, pairwise_cost
from mf_scale.matching.hungarian import Matching, match
from mf_scale.models.outputs import Classifier, LayerPrediction, MaskPrediction


@dataclass(frozen=True)
class Stages:
    """A loss in three parts, each of which takes what the one before it gave."""

    cost: Callable[[MaskPrediction], Any]
    """On the device."""
    solve: Callable[[Any], Any]
    """On the host, with both copies."""
    loss: Callable[[MaskPrediction, Any], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to the same loss of one batch."""

    name: str
    loss: Callable[[MaskPrediction], Tensor]
    """Total, matching included."""
    stages: Stages | None = None
    """Its parts, where they can be told apart."""
    matching: Callable[[MaskPrediction], object] | None = None
    """Else cost and assignment alone, where they can be."""


def contestants(classes: int, queries: int, batch: Batch, *, reference: bool) -> tuple[list[Contestant], str]:
    """Whoever can run on the batch's device, and a sentence on who cannot.

    What belongs to the batch (normalisers, the peer's dense masks) is made here: it is an input and not measured.
    """
    found, absent = [], []
    for kernels in KERNELS:
        reason = why_not(kernels, batch.labels.device.type, torch.float32)
        if reason is None:
            found.append(_ours(kernels, classes, queries, batch))
        else:
            absent.append(f"{kernels}: {reason}")
    if reference:
        found.append(plain(classes, queries, batch))
    try:
        found.append(_transformers(classes, batch))
    except ImportError:
        absent.append("transformers: not installed (pip install 'mf_scale[interop]')")
    return found, "; ".join(absent)


def _ours(kernels: str, classes: int, queries: int, batch: Batch) -> Contestant:
    config, matching = LossConfig(kernels=kernels), MatchingConfig()
    criterion = Criterion(config, matching, classes, queries)
    step = criterion.normalisers(criterion.totals(batch))

    def cost(prediction: MaskPrediction) -> PairwiseCost:
        return pairwise_cost(prediction, batch, matching, config)

    def solve(costs: PairwiseCost) -> Matching:
        return match(costs, batch, matching.nonfinite)

    def of_pairs(prediction: MaskPrediction, pairs: Matching) -> Tensor:
        return criterion.of_pairs(prediction, prediction.stacked(), batch, pairs, step).total

    return Contestant(f"mf_scale {kernels}", lambda x: criterion(x, batch, step).total, Stages(cost, solve, of_pairs))


def plain(classes: int, queries: int, batch: Batch) -> Contestant:
    """The plain reference, in the dtype of the prediction."""
    config, matching = LossConfig(), MatchingConfig()
    criterion = Criterion(config, matching, classes, queries)
    step = criterion.normalisers(criterion.totals(batch))

    def loss(prediction: MaskPrediction) -> Tensor:
        terms = reference_loss(prediction, batch, step.num_masks, step.class_weight, config, matching)
        return torch.stack(list(terms.values())).sum()

    return Contestant("reference", loss)


def _transformers(classes: int, batch: Batch) -> Contestant:
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

    weights = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
    matcher = MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0)
    criterion = MaskFormerLoss(classes, matcher=matcher, weight_dict=weights, eos_coef=0.1).to(batch.labels.device)
    masks, labels = dense_targets(batch)

    def loss(prediction: MaskPrediction) -> Tensor:
        *aux, last = _logits(prediction)
        terms = criterion(last["masks_queries_logits"], last["class_queries_logits"], masks, labels, aux)
        return torch.stack(
            [weights[name.rpartition("_")[0] if name[-1].isdigit() else name] * term for name, term in terms.items()]
        ).sum()

    def matching(prediction: MaskPrediction) -> object:
        with torch.no_grad():
            return [
                matcher(x["masks_queries_logits"], x["class_queries_logits"], masks, labels)
                for x in _logits(prediction)
            ]

    return Contestant("transformers", loss, matching=matching)


def dense_targets(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """The batch as the peer wants it, fp32 masks [T,H,W] and labels [T] an image."""
    counts = (batch.labels != NO_LABEL).sum(1).tolist()
    masks = [
        (m[0] == torch.arange(t, device=m.device)[:, None, None]).float()
        for m, t in zip(batch.segment_map, counts, strict=True)
    ]
    return masks, [row[:t] for row, t in zip(batch.labels, counts, strict=True)]


def _logits(prediction: MaskPrediction) -> list[dict[str, Tensor]]:
    """All layers' dense logits, the last layer last."""
    return [
        {
            "masks_queries_logits": torch.einsum("bqc,bchw->bqhw", layer.mask_embeddings, prediction.pixel_embeddings),
            "class_queries_logits": prediction.classifier.logits(layer.class_embeddings),
        }
        for layer in prediction.layers()
    ]


def leaf_copy(prediction: MaskPrediction, dtype: torch.dtype = torch.float32) -> MaskPrediction:
    """The prediction with tensors of its own that take gradients."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_()

    aux = tuple(LayerPrediction(leaf(x.class_embeddings), leaf(x.mask_embeddings)) for x in prediction.aux)
    bias = prediction.classifier.bias
    classifier = Classifier(leaf(prediction.classifier.weight), None if bias is None else leaf(bias))
    classes, masks = leaf(prediction.class_embeddings), leaf(prediction.mask_embeddings)
    return MaskPrediction(classes, masks, leaf(prediction.pixel_embeddings), classifier, aux)


def leaves(prediction: MaskPrediction) -> list[Tensor]:
    """All its tensors, the pixel embeddings last."""
    by_layer = [tensor for x in prediction.layers() for tensor in (x.class_embeddings, x.mask_embeddings)]
    bias = [] if prediction.classifier.bias is None else [prediction.classifier.bias]
    return [*by_layer, prediction.classifier.weight, *bias, prediction.pixel_embeddings]


def value_and_gradients(
    contestant: Contestant, prediction: MaskPrediction, dtype: torch.dtype = torch.float32
) -> tuple[float, list[Tensor]]:
    """The loss and its gradients by all tensors of the prediction."""
    own = leaf_copy(prediction, dtype)
    total = contestant.loss(own)
    return float(total.detach()), list(torch.autograd.grad(total, leaves(own)))
