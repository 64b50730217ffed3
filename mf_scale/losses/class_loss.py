"""Weighted cross-entropy of class embeddings whose logits are made a part at a time, the gradient in the forward pass.

What is kept for backward is the gradient of the embeddings and of the classifier, as large as these; no logits are.
Source of the idea: Hsu et al. 2024, Liger Kernel, the fused linear cross-entropy.
Shapes: B images, R rows (the queries of all layers) an image, W width of class embeddings, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.kernels.class_rows import Logits, hidden, hide, parts
from mf_scale.losses.long_tail import Adjustment
from mf_scale.models.outputs import Classifier


def class_loss(
    embeddings: Tensor,
    classifier: Classifier,
    targets: Tensor,
    weights: Tensor,
    *,
    asked: Tensor | None = None,
    adjustment: Adjustment | None = None,
    made: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum, each row's [B,R]) of the cross-entropies of rows [B,R,W], in fp32 or fp64; the sum is differentiable.

    `targets` int64 [B,R], K: no-object; `weights` [K+1] of the targets, in the loss's dtype. `asked` [B,K+1], of
    `asked_classes`: UNKNOWN classes leave the softmax, NOT_EXHAUSTIVE ones that of rows without a segment, and the
    gradient of their logits is exactly 0. `adjustment` is added to the logits as a constant. `made` are all
    logits [B*R,K+1], where someone has them; they are overwritten.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        given = (embeddings, classifier.weight, classifier.bias)
        trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        total, rows = _ClassLoss.apply(*given, targets, weights, asked, adjustment, trained, made)
    return total, rows


class _ClassLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        asked: Tensor | None,
        adjustment: Adjustment | None,
        trained: bool,
        made: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        logits = Logits(embeddings, Classifier(weight, bias))
        sums = _Gradients(logits, bias is not None) if trained else None
        found = []
        whole = (slice(0, len(embeddings)), slice(0, embeddings.shape[1]))
        for images, rows in parts(embeddings, len(weight)) if made is None else [whole]:
            own, of_rows = logits.rows(images, rows), targets[images, rows]
            log_probability = _log_probability(
                logits.of(own) if made is None else made, of_rows, _part_of(asked, images), adjustment
            )
            flat = of_rows.flatten()
            found.append(F.nll_loss(log_probability, flat, weights, reduction="none"))
            if sums is not None:
                sums.add(own, _by_logits(log_probability, flat, weights))
            del log_probability  # before the next part's are made
        of_row = _joined(found).view(targets.shape)
        if sums is not None:
            ctx.save_for_backward(_joined(sums.rows).view(embeddings.shape), sums.weight, sums.bias)
            ctx.dtypes = (embeddings.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(of_row)
        ctx.set_materialize_grads(False)
        return of_row.sum(), of_row

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_total = grads[0]
        if of_total is None:
            return (None,) * 9
        if torch.is_grad_enabled():
            # The kept gradients are constants to torch: second derivatives would come out wrong, and nobody be told.
            raise RuntimeError("the class loss has no second derivative: do not use create_graph=True")
        found = [
            (gradient * of_total).to(dtype) if needed and gradient is not None else None
            for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return (*found, None, None, None, None, None, None)


class _Gradients:
    """Sums of the gradients over parts, in the loss's dtype and in the order of the parts."""

    def __init__(self, logits: Logits, biased: bool) -> None:
        self._logits = logits
        self.rows: list[Tensor] = []
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._biased = biased

    def add(self, own: Tensor, by_logits: Tensor) -> None:
        """A part's: of its rows `own` [n,W], from the gradient by their logits [n,K+1]."""
        self.rows.append(self._logits.product(by_logits, self._logits.weight))
        self.weight = self._logits.product(by_logits.T, own, self.weight)
        if self._biased:
            of_bias = by_logits.sum(0)
            self.bias = of_bias if self.bias is None else self.bias.add_(of_bias)


def _joined(found: list[Tensor]) -> Tensor:
    return found[0] if len(found) == 1 else torch.cat(found)


def _part_of(asked: Tensor | None, images: slice) -> Tensor | None:
    return None if asked is None else asked[images]


def _log_probability(logits: Tensor, targets: Tensor, asked: Tensor | None, adjustment: Adjustment | None) -> Tensor:
    """[n,K+1] of the logits of a part, which are overwritten; targets [b,r], asked [b,K+1]."""
    which = None if asked is None else hidden(asked, targets < logits.shape[1] - 1)
    if which is not None:
        hide(logits, which)
    if adjustment is not None:
        logits.add_(adjustment(logits, targets.flatten()))
        if which is not None:
            hide(logits, which)  # an adjustment of a row where nothing is known may be anything
    return logits.log_softmax(dim=1)


def _by_logits(log_probability: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the weighted cross-entropies [n] by the logits [n,K+1], in the memory of `log_probability`."""
    own = weights[targets][:, None]
    gradient = log_probability.exp_().mul_(own)
    # Not by adding at places: which of several additions comes first is not fixed on a GPU. Here each has its own.
    place = targets[:, None]
    return gradient.scatter_(1, place, gradient.gather(1, place) - own)
