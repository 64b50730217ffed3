"""The loss of per-pixel classification: cross-entropy of every labelled pixel, in every supervised layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.data.batch import UNKNOWN, Batch
from mf_scale.kernels.class_rows import asked_classes
from mf_scale.losses.pixel_loss import UNCOUNTED, pixel_losses
from mf_scale.losses.terms import LossTerms
from mf_scale.models.outputs import PixelPrediction


class PixelCriterion:
    """Mean cross-entropy over the pixels of the step that have a segment. Source: MaskFormer section 4.1, its code.

    Pixels that are NONE or IGNORE are out. All outputs of the model take part for every batch by the same operations,
    also for one without a labelled pixel, whose loss is 0. (The paper's code takes the mean of each GPU's share.)
    Classes that are unknown in an image are in no softmax of its pixels.
    """

    names: tuple[str, ...] = ("pixel",)
    counted: tuple[str, ...] = ()
    summed = 1

    def totals(self, batch: Batch) -> tuple[float, ...]:
        """Pixels with a segment."""
        return (float((batch.segment_map[:, 0] >= 0).sum()),)

    def normalisers(self, totals: Sequence[float]) -> float:
        """Counted pixels of the step, at least 1."""
        return max(1.0, totals[0])

    def denominators(self, totals: Sequence[float]) -> dict[str, float]:
        """The only term's."""
        return {"pixel": self.normalisers(totals)}

    def __call__(self, prediction: PixelPrediction, batch: Batch, normalisers: float) -> LossTerms:
        """`prediction` in any float dtype, `batch` of the semantic task on its device; the loss is made in fp32."""
        with torch.autocast(prediction.pixel_embeddings.device.type, enabled=False):
            embeddings, pixels = _wide(prediction.stacked()), _wide(prediction.pixel_embeddings)
            bias = prediction.bias
            bias = embeddings.new_zeros(embeddings.shape[2]) if bias is None else _wide(bias)
            total, layers = pixel_losses(embeddings, pixels, bias, pixel_classes(batch), unknown_classes(batch))
            total = total / normalisers
        return LossTerms(total, {"pixel": total.detach()}, layers={"pixel": layers / normalisers})


def pixel_classes(batch: Batch) -> Tensor:
    """Class of every pixel, int64 [B,H,W], UNCOUNTED where there is no segment; the semantic task has one map layer."""
    segment_map = batch.segment_map[:, 0].long()
    labels = F.pad(batch.labels, (0, 1), value=UNCOUNTED)
    index = torch.where(segment_map >= 0, segment_map, labels.shape[1] - 1)
    return labels.gather(1, index.flatten(1)).view_as(segment_map)


def unknown_classes(batch: Batch) -> Tensor | None:
    """Classes that leave the softmax of an image's pixels, bool [B,K]; None where all is known of all images.

    NOT_EXHAUSTIVE stays: a counted pixel has a class, so there is no pixel that "found something that is not marked".
    """
    if batch.class_mask is None:
        return None
    return asked_classes(batch.class_mask, batch.labels)[:, :-1] == UNKNOWN


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
