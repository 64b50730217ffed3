"""Class logits a part at a time, and which classes an image's queries are not asked about; for loss and matching cost.

Shapes: B images, R rows (the queries of all layers) an image, W width of class embeddings, K classes, T segments. At
K = 10,000 the logits of all rows are hundreds of MB several times over; of a part they are a few.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.data.batch import NOT_EXHAUSTIVE, UNKNOWN
from mf_scale.kernels.mask_loss import tf32, wide
from mf_scale.models.outputs import Classifier

CHUNK = {"cpu": 2**21, "cuda": 2**23}
"""Logits at once. A product of fewer rows reads the classifier too often; 32 MiB are enough to fill a GPU."""
_HALF = (torch.bfloat16, torch.float16)


def parts(embeddings: Tensor, classes: int) -> Iterator[tuple[slice, slice]]:
    """Images and their rows, in order, of embeddings [B,R,W] whose rows have so many logits.

    Whole images, as many as fit, or a share of one's rows; a single part if all fit.
    """
    images, rows = embeddings.shape[:2]
    most = max(1, CHUNK.get(embeddings.device.type, CHUNK["cpu"]) // classes)
    together = max(1, most // max(1, rows))
    for first in range(0, images, together):
        for row in range(0, rows, most):
            yield slice(first, min(first + together, images)), slice(row, min(row + most, rows))


class Logits:
    """Makes the logits of a part; the classifier is widened once. For one step: what is kept is taken once."""

    def __init__(self, embeddings: Tensor, classifier: Classifier) -> None:
        """Of embeddings [B,R,W]."""
        self._embeddings, self.weight = embeddings, wide(classifier.weight)
        self._bias = None if classifier.bias is None else classifier.bias.to(self.weight.dtype)
        # TF32 holds factors in half precision exactly; other products follow the process's setting.
        self._exact = embeddings.is_cuda and embeddings.dtype in _HALF and classifier.weight.dtype in _HALF
        self.kept: Tensor | None = None
        """All logits [n,K+1], where they are one part: the cost leaves them for the loss, which overwrites them."""

    def taken(self) -> Tensor | None:
        """What was kept, if anything; it is the caller's then."""
        kept, self.kept = self.kept, None
        return kept

    def rows(self, images: slice, rows: slice) -> Tensor:
        """Embeddings of a part, widened, [n,W]."""
        return self._embeddings[images, rows].flatten(0, 1).to(self.weight.dtype)

    def of(self, rows: Tensor) -> Tensor:
        """Logits [n,K+1] of rows [n,W]: new memory, in at least fp32."""
        with tf32(self._exact):
            return F.linear(rows, self.weight, self._bias)

    def product(self, left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
        """[m,k] by [k,n], where one is a gradient by logits, with as many bits; added to `total` in place."""
        with tf32(self._exact):
            return left @ right if total is None else total.addmm_(left, right)


def shift_among_classes(logits: Tensor, added: Tensor) -> Tensor:
    """What a row of logits [.,K] gets besides `added` [K] so that its logsumexp stays as it is, [.].

    So the classes share anew what they have together, and no-object beside them keeps its probability.
    """
    shift = logits.logsumexp(dim=-1) - (logits + added).logsumexp(dim=-1)
    # All classes hidden: there is nothing to share.
    return torch.where(shift.isfinite(), shift, torch.zeros_like(shift))


def asked_classes(class_mask: Tensor, labels: Tensor) -> Tensor:
    """A batch's class mask [B,K] as the logits have it, [B,K+1], no-object counted.

    A class that one of the image's segments (labels [B,T]) has is known there, whatever the mask says.
    """
    asked = F.pad(class_mask, (0, 1))
    index = torch.where(labels >= 0, labels, class_mask.shape[1])
    of_segments = asked.gather(1, index)
    return asked.scatter_(1, index, of_segments.masked_fill_(of_segments == UNKNOWN, 0))


def hidden(asked: Tensor, matched: Tensor | None) -> Tensor:
    """What leaves the softmax, bool [b,r,K+1] or [b,1,K+1], of `asked` [b,K+1].

    UNKNOWN for every query; with `matched` [b,r], NOT_EXHAUSTIVE for the queries that are not.
    """
    unknown = (asked == UNKNOWN)[:, None]
    return unknown if matched is None else unknown | ((asked == NOT_EXHAUSTIVE)[:, None] & ~matched[..., None])


def hide(logits: Tensor, which: Tensor) -> Tensor:
    """Put -inf in the place of logits [n,K+1] that `hidden` gave, in place."""
    return logits.view(which.shape[0], -1, which.shape[2]).masked_fill_(which, -torch.inf).view_as(logits)
