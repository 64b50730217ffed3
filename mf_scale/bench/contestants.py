"""The losses that are measured: ours by each kernel, the plain reference, and the peer when it is installed.

Every one starts from the embeddings, matches, and can be taken backward to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import NO_LABEL, Batch
from mf_scale.kernels.choose import KERNELS, why_not
from mf_scale.losses.criterion import Criterion
from mf_scale.losses.reference import reference_loss
from mf_scale.matching.cost import pairwise_cost
from mf_scale.matching.hungarian import match
from mf_scale.models.outputs import MaskPrediction


@dataclass(frozen=True)
class Contestant:
    """One way to the same loss."""

    name: str
    loss: Callable[[MaskPrediction, Batch], Tensor]
    """Total of a batch, matching included."""
    matching: Callable[[MaskPrediction, Batch], object] | None
    """The matching alone, where it can be told apart."""


def contestants(classes: int, queries: int, device: torch.device, *, reference: bool) -> tuple[list[Contestant], str]:
    """Whoever can run here, and a sentence on who cannot."""
    found, absent = [], []
    for kernels in KERNELS:
        reason = why_not(kernels, device.type, torch.float32)
        if reason is None:
            found.append(_ours(kernels, classes, queries))
        else:
            absent.append(f"{kernels}: {reason}")
    if reference:
        found.append(Contestant("reference", _reference, None))
    try:
        found.append(_transformers(classes))
    except ImportError:
        absent.append("transformers: not installed (pip install 'mf_scale[interop]')")
    return found, "; ".join(absent)


def _ours(kernels: str, classes: int, queries: int) -> Contestant:
    config, matching = LossConfig(kernels=kernels), MatchingConfig()
    criterion = Criterion(config, matching, classes, queries)

    def loss(prediction: MaskPrediction, batch: Batch) -> Tensor:
        return criterion(prediction, batch, criterion.normalisers(criterion.totals(batch))).total

    def assign(prediction: MaskPrediction, batch: Batch) -> object:
        return match(pairwise_cost(prediction, batch, matching, config), batch, matching.nonfinite)

    return Contestant(f"mf_scale {kernels}", loss, assign)


def _reference(prediction: MaskPrediction, batch: Batch) -> Tensor:
    queries = prediction.class_logits.shape[1]
    criterion = Criterion(LossConfig(), MatchingConfig(), prediction.class_logits.shape[2] - 1, queries)
    step = criterion.normalisers(criterion.totals(batch))
    terms = reference_loss(prediction, batch, step.num_masks, step.class_weight, LossConfig(), MatchingConfig())
    return torch.stack(list(terms.values())).sum()


def _transformers(classes: int) -> Contestant:
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

    weights = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
    matcher = MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0)
    criterion = MaskFormerLoss(classes, matcher=matcher, weight_dict=weights, eos_coef=0.1)

    def loss(prediction: MaskPrediction, batch: Batch) -> Tensor:
        masks, labels = dense_targets(batch)
        criterion.to(prediction.pixel_embeddings.device)
        *aux, last = _logits(prediction)
        terms = criterion(last["masks_queries_logits"], last["class_queries_logits"], masks, labels, aux)
        return torch.stack(
            [weights[name.rpartition("_")[0] if name[-1].isdigit() else name] * term for name, term in terms.items()]
        ).sum()

    def assign(prediction: MaskPrediction, batch: Batch) -> object:
        masks, labels = dense_targets(batch)
        with torch.no_grad():
            return [
                matcher(x["masks_queries_logits"], x["class_queries_logits"], masks, labels)
                for x in _logits(prediction)
            ]

    return Contestant("transformers", loss, assign)


def dense_targets(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """The batch as the peer wants it, fp32 masks [T,H,W] and labels [T] an image; made once, they are inputs."""
    if id(batch) not in _DENSE:
        _DENSE.clear()
        counts = (batch.labels != NO_LABEL).sum(1).tolist()
        masks = [
            (m[0] == torch.arange(t, device=m.device)[:, None, None]).float()
            for m, t in zip(batch.segment_map, counts, strict=True)
        ]
        _DENSE[id(batch)] = batch, masks, [row[:t] for row, t in zip(batch.labels, counts, strict=True)]
    return _DENSE[id(batch)][1:]


_DENSE: dict[int, Any] = {}


def _logits(prediction: MaskPrediction) -> list[dict[str, Tensor]]:
    """All layers' dense logits, the last layer last."""
    return [
        {
            "masks_queries_logits": torch.einsum("bqc,bchw->bqhw", layer.mask_embeddings, prediction.pixel_embeddings),
            "class_queries_logits": layer.class_logits,
        }
        for layer in prediction.layers()
    ]


def leaf_copy(prediction: MaskPrediction) -> MaskPrediction:
    """The prediction with tensors of its own that take gradients."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    aux = tuple(
        replace(x, class_logits=leaf(x.class_logits), mask_embeddings=leaf(x.mask_embeddings)) for x in prediction.aux
    )
    return MaskPrediction(
        leaf(prediction.class_logits), leaf(prediction.mask_embeddings), leaf(prediction.pixel_embeddings), aux
    )
