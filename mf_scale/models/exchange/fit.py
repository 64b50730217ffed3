"""A file in another program's names against one of our models: what fits, what does not, what is left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mf_scale.models.exchange.links import Link, to_ours
from mf_scale.models.weights import WeightsReport, compare


@dataclass(frozen=True)
class Fit:
    """The outcome of a translation into our names."""

    tensors: dict[str, Tensor]
    """Under our names, those that the model has."""
    report: WeightsReport
    """Missing and unexpected in the file's names, shapes in both."""
    notes: tuple[str, ...]
    """A sentence for each kind of tensor of the file that has no use here, with their number."""


def fit(
    own: Mapping[str, Tensor],
    links: Sequence[Link],
    given: Mapping[str, Tensor],
    without_use: Callable[[str], str | None],
) -> Fit:
    """Translate `given` into our names and compare it with the state_dict `own`.

    `without_use` says why a name of theirs that no link has is not needed, or None when it is unexpected. A batch
    norm's counter may be missing on either side.
    """
    translation = to_ours(links, given)
    reasons = Counter(reason for name in translation.unexpected if (reason := without_use(name)))
    compared = compare(own, translation.tensors)
    theirs = {name: " + ".join(link.theirs) for link in links for name in link.ours}
    report = replace(
        compared,
        missing=(*translation.missing, *(f"{name} (it has no name there)" for name in own if name not in theirs)),
        unexpected=tuple(n for n in translation.unexpected if not without_use(n)) + compared.unexpected,
        mismatched=tuple((f"{name} ({theirs[name]})", file, here) for name, file, here in compared.mismatched),
    )
    tensors = {name: tensor for name, tensor in translation.tensors.items() if name in own}
    return Fit(tensors, report, tuple(f"left out: {count} x {reason}" for reason, count in reasons.items()))
