"""Counts and frequency bands of unified classes, from those of the sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mf_scale.errors import UserError
from mf_scale.unify.merge import LEFT_OUT, Unified
from mf_scale.unify.words import listed
from mf_scale.vocabulary import Vocabulary

RARE, COMMON = 10, 100
"""Images of a class up to which it is rare, and common; more is frequent (Gupta et al. 2019, LVIS)."""


def unified_counts(unified: Unified, counts: Sequence[np.ndarray]) -> np.ndarray:
    """Sums over the sources, int64 [K]; `counts`: of each source, int [K_source], in the order of `unified.sources`.

    Where several classes of one source are one unified class, an image that holds two of them counts twice, and so
    does an image that two sources share (LVIS and COCO): the sums are upper bounds of the images.
    """
    total = np.zeros(len(unified.vocabulary), np.int64)
    for source, own in zip(unified.sources, counts, strict=True):
        if own.shape != source.labels.shape:
            raise UserError(
                f"{source.vocabulary} has {len(source.labels)} classes, and counts of shape {own.shape} were given",
                where=source.where,
            )
        kept = source.labels != LEFT_OUT
        np.add.at(total, source.labels[kept], own[kept])
    return total


def with_bands(vocabulary: Vocabulary, images: np.ndarray) -> Vocabulary:
    """The vocabulary with bands made from `images` [K] by LVIS's law; UserError for classes without any image."""
    if images.shape != (len(vocabulary),):
        raise UserError(f"{len(vocabulary)} classes of {vocabulary.name!r} have counts of shape {images.shape}")
    empty = [info.name for info, count in zip(vocabulary.classes, images, strict=True) if count <= 0]
    if empty:
        raise UserError(
            f"{len(empty):,} classes of {vocabulary.name!r} have no image, and so no frequency band: {listed(empty)}",
            remedy="Leave them out (map them to null), add a source that has them, or do not ask for bands.",
        )
    return replace(
        vocabulary,
        classes=tuple(
            replace(info, frequency=_band(int(count))) for info, count in zip(vocabulary.classes, images, strict=True)
        ),
    )


def _band(images: int) -> str:
    return "rare" if images <= RARE else "common" if images <= COMMON else "frequent"
