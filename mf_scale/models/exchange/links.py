"""Two naming schemes of the same weights: which tensors of one are which of the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mf_scale.models.weights import COUNTER

NORM = ("weight", "bias")
BATCH_NORM = (*NORM, "running_mean", "running_var")


@dataclass(frozen=True)
class Link:
    """The same numbers under two naming schemes.

    Several names on a side are parts of one tensor, laid one after the other along the first dimension: query, key and
    value, apart on one side and joined on the other.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    optional: bool = False
    """True for what nothing is computed from: neither side has to have it."""


@dataclass(frozen=True)
class Translation:
    """Tensors under the other side's names, and what could not be translated."""

    tensors: dict[str, Tensor]
    missing: tuple[str, ...]
    """Names, as the given side says them, that were not given."""
    unexpected: tuple[str, ...]
    """Given names that no link knows."""


def same(ours: str, theirs: str, endings: Iterable[str] = NORM) -> list[Link]:
    """Links of one module on each side, one for each of its tensors; a linear layer's names are a norm's."""
    return [Link((f"{ours}.{ending}",), (f"{theirs}.{ending}",)) for ending in endings]


def same_batch_norm(ours: str, theirs: str) -> list[Link]:
    """Links of a batch norm: affine, statistics, and the counter that not every one has."""
    counter = Link((ours + COUNTER,), (theirs + COUNTER,), optional=True)
    return [*same(ours, theirs, BATCH_NORM), counter]


def to_ours(links: Sequence[Link], given: Mapping[str, Tensor]) -> Translation:
    """Tensors under their names -> ours."""
    return _translate([(link.theirs, link.ours, link.optional) for link in links], given)


def to_theirs(links: Sequence[Link], given: Mapping[str, Tensor]) -> Translation:
    """Tensors under our names -> theirs."""
    return _translate([(link.ours, link.theirs, link.optional) for link in links], given)


def _translate(pairs: list[tuple[tuple[str, ...], tuple[str, ...], bool]], given: Mapping[str, Tensor]) -> Translation:
    tensors: dict[str, Tensor] = {}
    missing: list[str] = []
    for sources, targets, optional in pairs:
        absent = [name for name in sources if name not in given]
        if not absent:
            tensors |= _parts([given[name] for name in sources], targets)
        elif not optional:
            missing += absent
    known = {name for sources, _, _ in pairs for name in sources}
    return Translation(tensors, tuple(missing), tuple(name for name in given if name not in known))


def _parts(sources: list[Tensor], targets: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    whole = sources[0] if len(sources) == 1 else torch.cat(sources)
    if len(targets) == 1:
        return zip(targets, (whole,), strict=True)
    # A length that does not divide gives parts of a wrong shape, which the comparison with the model then names.
    parts = whole.tensor_split(len(targets))
    return zip(targets, (part.clone() for part in parts), strict=True)
