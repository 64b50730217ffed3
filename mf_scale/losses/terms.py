"""What the training loop knows of a loss, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from mf_scale.data.batch import Batch


@dataclass(frozen=True)
class LossTerms:
    """Loss of one micro-batch."""

    total: Tensor
    """Scalar in fp32: this micro-batch's share of the step's loss, which is the sum over micro-batches and ranks."""
    terms: dict[str, Tensor]
    """By name: detached, weighted, normalised, summed over layers; their sum is the total."""
    counts: dict[str, int] = field(default_factory=dict)
    """What was counted beside, by name."""
    layers: dict[str, Tensor] = field(default_factory=dict)
    """The terms by supervised layer [S], the last one last, where the loss can tell; detached."""
    nonfinite: list[dict[str, Any]] = field(default_factory=list)
    """Non-finite matching costs that were replaced: layer, key, queries, term."""


class StepLoss(Protocol):
    """A training loss whose terms are sums divided by normalisers of the whole step.

    One call sees one micro-batch of one rank. The step's loss is the plain sum over micro-batches and ranks, so 1 x 4,
    4 x 1 and 2 ranks x 2 are the same loss; undoing the averages of a framework is the engine's part, not a loss's.
    """

    names: tuple[str, ...]
    """Of the terms, as they are logged."""
    counted: tuple[str, ...]
    """Names of `LossTerms.counts`."""

    summed: int
    """Length of `totals`."""

    def totals(self, batch: Batch) -> tuple[float, ...]:
        """What is counted of a batch on the host; a step's totals are the sums over its parts and ranks."""

    def normalisers(self, totals: Sequence[float]) -> Any:
        """What a call divides by, from the totals of the whole step; never 0. Totals of 1 leave plain sums."""

    def denominators(self, totals: Sequence[float]) -> dict[str, float]:
        """The same by the name of the term."""

    def __call__(self, prediction: Any, batch: Batch, normalisers: Any) -> LossTerms:
        """The model's prediction in any float dtype, the batch on its device; the loss is made in fp32."""
