"""The loss of mask classification: matching, class cross-entropy and mask losses of all supervised layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import NO_LABEL, Batch
from mf_scale.losses.mask_loss import MaskLoss, mask_loss
from mf_scale.losses.terms import LossTerms
from mf_scale.matching.cost import pairwise_cost
from mf_scale.matching.hungarian import Matching, match
from mf_scale.models.outputs import LayerPrediction, MaskPrediction


@dataclass(frozen=True)
class Normalisers:
    """Denominators of a step, over all its micro-batches and ranks (sums of `target_totals`)."""

    num_masks: float
    """Segments of the step, those beyond the queries included; below 1 counts as 1."""
    class_weight: float
    """Sum of the class weights of all targets of one layer: matched queries count 1, the others no_object_weight."""


def target_totals(batch: Batch, queries: int, no_object_weight: float) -> tuple[float, float]:
    """num_masks and class_weight of one batch on the host: a step's normalisers are their sums.

    Sum of T, and sum over images of min(T, Q) + w (Q - min(T, Q)). Does not synchronise for a batch that is on the CPU.
    """
    segments = (batch.labels != NO_LABEL).sum(dim=1).tolist()
    matched = sum(min(t, queries) for t in segments)
    return float(sum(segments)), matched + no_object_weight * (queries * len(segments) - matched)


class Criterion:
    """Loss of a prediction against a batch. Every layer is matched anew. Source: MaskFormer section 3.3.

    All outputs of the model take part for every batch, also for one without segments, by the same operations: the class
    logits of all queries in the cross-entropy, embeddings in a product of at least one (padding) pair an image. So all
    ranks build the same graph and every parameter has a gradient.
    """

    names: tuple[str, ...] = ("class", "focal", "dice")
    counted: tuple[str, ...] = ("matched", "surplus")
    """Segments that have a query in each layer, and those beyond the queries: unmatched, though in num_masks."""

    summed = 2

    def __init__(self, loss: LossConfig, matching: MatchingConfig, num_classes: int, queries: int) -> None:
        self.loss, self.matching, self.num_classes, self.queries = loss, matching, num_classes, queries

    def totals(self, batch: Batch) -> tuple[float, ...]:
        """Segments and class weight of a batch."""
        return target_totals(batch, self.queries, self.loss.no_object_weight)

    def normalisers(self, totals: Sequence[float]) -> Normalisers:
        """Of a step, from its summed totals."""
        return Normalisers(max(1.0, totals[0]), max(1e-12, totals[1]))

    def denominators(self, totals: Sequence[float]) -> dict[str, float]:
        """The class term is a mean over weighted queries, the others over segments."""
        step = self.normalisers(totals)
        return {"class": step.class_weight, "focal": step.num_masks, "dice": step.num_masks}

    def __call__(self, prediction: MaskPrediction, batch: Batch, normalisers: Normalisers) -> LossTerms:
        """`prediction` in any float dtype, `batch` on its device; the loss is made in fp32.

        Raises GuardError for a non-finite matching cost under the policy strict.
        """
        cost = pairwise_cost(prediction, batch, self.matching, self.loss)
        pairs = match(cost, batch, self.matching.nonfinite)
        num_masks = max(1.0, normalisers.num_masks)
        with torch.autocast(prediction.pixel_embeddings.device.type, enabled=False):
            stacked = prediction.stacked()
            by_class = self._class_loss(stacked.class_logits, batch, pairs) / normalisers.class_weight
            masks = self._mask_loss(stacked, prediction.pixel_embeddings, batch, pairs)
        total = self.loss.class_weight * by_class + masks.total / num_masks
        terms = {
            "class": self.loss.class_weight * by_class.detach(),
            "focal": self.loss.focal_weight * masks.focal.sum() / num_masks,
            "dice": self.loss.dice_weight * masks.dice.sum() / num_masks,
        }
        return LossTerms(total, terms, {"matched": pairs.matched, "surplus": pairs.surplus}, pairs.nonfinite)

    def _class_loss(self, class_logits: Tensor, batch: Batch, pairs: Matching) -> Tensor:
        """Sum over images, layers and queries of the weighted cross-entropy; class_logits [B,S,Q,K+1]."""
        flat = _wide(class_logits.flatten(1, 2))
        targets = flat.new_full((len(flat), flat.shape[1] + 1), self.num_classes, dtype=torch.int64)
        labels = F.pad(batch.labels, (0, 1)).gather(1, pairs.segments)
        targets = targets.scatter(1, pairs.slots, labels)[:, :-1]  # padding pairs wrote into the last column
        weight = flat.new_ones(self.num_classes + 1)
        weight[-1] = self.loss.no_object_weight
        return F.cross_entropy(flat.flatten(0, 1), targets.flatten(), weight, reduction="sum")

    def _mask_loss(self, stacked: LayerPrediction, pixel_embeddings: Tensor, batch: Batch, pairs: Matching) -> MaskLoss:
        """The second product: logits [B,P,h,w] of the matched queries only."""
        embeddings = stacked.mask_embeddings.flatten(1, 2)
        slots = pairs.slots.clamp(max=embeddings.shape[1] - 1)
        image = torch.arange(len(slots), device=slots.device)[:, None]
        logits = torch.einsum("bpc,bchw->bphw", _wide(embeddings[image, slots]), _wide(pixel_embeddings))
        layers = F.pad(batch.segment_layer, (0, 1)).gather(1, pairs.segments)
        return mask_loss(logits, batch.segment_map, pairs.segments, layers, pairs.counts, self.loss)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
