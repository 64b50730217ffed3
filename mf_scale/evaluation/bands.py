"""Results by frequency band of a long-tailed vocabulary: means over rare, common and frequent classes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mf_scale.vocabulary import BANDS, Vocabulary

PER_CLASS = {"mIoU": ("semantic", "IoU"), "PQ": ("panoptic", "PQ"), "AP": ("instances", "AP")}
"""Number of a band: where its classes' values stand, as (part, name in "per_class")."""


def band_results(vocabulary: Vocabulary, results: dict[str, Any]) -> dict[str, Any] | None:
    """{"of_class": bands, band: {"classes", "mIoU", "PQ", "AP"}}; None for a vocabulary that knows no bands.

    A number is the mean over the band's classes that have a value, None where none has or the task has no such number.
    """
    of_class = [c.frequency for c in vocabulary.classes]
    if not any(of_class):
        return None
    told: dict[str, Any] = {"of_class": of_class}
    for band in BANDS:
        members = [label for label, of in enumerate(of_class) if of == band]
        told[band] = {"classes": len(members)}
        for name, (part, values) in PER_CLASS.items():
            told[band][name] = mean_of(results[part]["per_class"][values], members) if part in results else None
    return told


def mean_of(values: Sequence[float | None], members: Sequence[int]) -> float | None:
    """Mean over those of the classes `members` that have a value; None where none has."""
    known = [value for label in members if (value := values[label]) is not None]
    return sum(known) / len(known) if known else None
