"""The loss of mask classification: matching, class cross-entropy and mask losses of all supervised layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import NO_LABEL, Batch
from mf_scale.kernels.class_rows import Logits, asked_classes
from mf_scale.kernels.mask_loss import wide_dtype
from mf_scale.losses.class_loss import class_loss
from mf_scale.losses.long_tail import Adjustment
from mf_scale.losses.mask_loss import MaskLoss, mask_loss
from mf_scale.losses.terms import LossTerms
from mf_scale.matching.cost import pairwise_cost
from mf_scale.matching.hungarian import Matching, match
from mf_scale.models.outputs import Classifier, LayerPrediction, MaskPrediction


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
    embeddings of all queries in the cross-entropy, the masks' in a product of at least one (padding) pair an image.
    So all ranks build the same graph and every parameter has a gradient.
    """

    names: tuple[str, ...] = ("class", "focal", "dice")
    counted: tuple[str, ...] = ("matched", "surplus")
    """Segments that have a query in each layer, and those beyond the queries: unmatched, though in num_masks."""

    summed = 2

    def __init__(
        self,
        loss: LossConfig,
        matching: MatchingConfig,
        num_classes: int,
        queries: int,
        adjustment: Adjustment | None = None,
    ) -> None:
        """`adjustment` of the class logits for long tails; None: the paper's plain cross-entropy."""
        self.loss, self.matching, self.num_classes, self.queries = loss, matching, num_classes, queries
        self.adjustment = adjustment

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
        with torch.autocast(prediction.pixel_embeddings.device.type, enabled=False):
            stacked = prediction.stacked()
        with torch.no_grad():
            logits = Logits(stacked.class_embeddings.flatten(1, 2), prediction.classifier)
        cost = pairwise_cost(prediction, batch, self.matching, self.loss, stacked, logits)
        pairs = match(cost, batch, self.matching.nonfinite)
        return self.of_pairs(prediction, stacked, batch, pairs, normalisers, logits.taken())

    def of_pairs(
        self,
        prediction: MaskPrediction,
        stacked: LayerPrediction,
        batch: Batch,
        pairs: Matching,
        normalisers: Normalisers,
        made: Tensor | None = None,
    ) -> LossTerms:
        """The same for queries that are matched already; `stacked` are the prediction's layers.

        `made` are the class logits where the cost has left them; they are overwritten.
        """
        per_mask = 1 / max(1.0, normalisers.num_masks)
        with torch.autocast(prediction.pixel_embeddings.device.type, enabled=False):
            scale = self.loss.class_weight / normalisers.class_weight
            by_class, class_layers = self._class_loss(
                stacked.class_embeddings, prediction.classifier, pairs, scale, batch, made
            )
            masks = self._mask_loss(stacked.mask_embeddings, prediction.pixel_embeddings, batch, pairs)
        total = torch.add(by_class, masks.total, alpha=per_mask)
        terms = {
            "class": by_class.detach(),
            "focal": self.loss.focal_weight * per_mask * masks.focal.sum(),
            "dice": self.loss.dice_weight * per_mask * masks.dice.sum(),
        }
        focal, dice = self._by_layer(masks, pairs, stacked.mask_embeddings.shape)
        layers = {
            "class": class_layers,
            "focal": self.loss.focal_weight * per_mask * focal,
            "dice": self.loss.dice_weight * per_mask * dice,
        }
        counts = {"matched": pairs.matched, "surplus": pairs.surplus}
        return LossTerms(total, terms, counts, layers, pairs.nonfinite)

    def _class_loss(
        self,
        class_embeddings: Tensor,
        classifier: Classifier,
        pairs: Matching,
        scale: float,
        batch: Batch,
        made: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum over images, layers and queries of the weighted cross-entropy times `scale`, and by layer [S], detached.

        class_embeddings [B,S,Q,W].
        """
        targets = pairs.labels.remainder(self.num_classes + 1)  # NO_LABEL is -1 and becomes K, no-object
        weights = class_embeddings.new_full((self.num_classes + 1,), scale, dtype=wide_dtype(classifier.weight))
        weights[-1].fill_(scale * self.loss.no_object_weight)  # assigning a number would wait for the GPU
        asked = None if batch.class_mask is None else asked_classes(batch.class_mask, batch.labels)
        given = (class_embeddings.flatten(1, 2), classifier, targets, weights)
        total, rows = class_loss(*given, asked=asked, adjustment=self.adjustment, made=made)
        return total, rows.view(class_embeddings.shape[:3]).sum(dim=(0, 2))

    def _by_layer(self, masks: MaskLoss, pairs: Matching, shape: torch.Size) -> Tensor:
        """Focal and dice loss summed by layer, [2,S]; `shape` [B,S,Q,C] of the mask embeddings."""
        layers, queries = shape[1:3]
        layer = pairs.slots.remainder(layers * queries).div(queries, rounding_mode="floor")
        of_layer = layer[..., None] == torch.arange(layers, device=layer.device)
        # Padding pairs have losses of 0. A sum, since a product of matrices may round to TF32.
        return (torch.stack((masks.focal, masks.dice))[..., None] * of_layer).sum(dim=(1, 2))

    def _mask_loss(self, mask_embeddings: Tensor, pixel_embeddings: Tensor, batch: Batch, pairs: Matching) -> MaskLoss:
        """The second product, for the matched queries only; mask_embeddings [B,S,Q,C]."""
        # Its backward is one addition on a GPU too; only padding pairs share a slot, with zeros, so no order matters.
        matched = mask_embeddings.flatten(0, 2).index_select(0, pairs.slots.flatten()).unflatten(0, pairs.slots.shape)
        segments = (batch.segment_map, pairs.segments, pairs.layers, pairs.counts)
        return mask_loss(matched, pixel_embeddings, *segments, self.loss, batch.keys)
