"""Mapping: labels as they were packed -> those of a unified vocabulary, and what of it an image does not tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mf_scale.data.batch import NOT_EXHAUSTIVE, UNKNOWN
from mf_scale.data.decode import Federated, StoredSample
from mf_scale.unify import LEFT_OUT, UnifiedSource, unified_federation


def mapped_sample(sample: StoredSample, way: UnifiedSource) -> StoredSample:
    """A sample with unified labels, LEFT_OUT for segments that have none; what was looked for in it likewise."""
    federated = sample.federated
    if federated is not None:
        lists = sample.labels, federated.negative, federated.not_exhaustive
        federated = Federated(*unified_federation(way, *lists))
    return replace(sample, labels=way.labels[sample.labels], federated=federated)


def mapped_lists(offsets: np.ndarray, labels: np.ndarray, way: UnifiedSource) -> tuple[np.ndarray, np.ndarray]:
    """Lists of labels, int64 [n+1] and labels, in unified ones: sorted, each once, int64; what is left out is gone."""
    classes = len(way.known)
    unified = way.labels[labels]
    images = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    kept = unified != LEFT_OUT
    pairs = np.unique(images[kept] * classes + unified[kept])
    lengths = np.bincount(pairs // classes, minlength=len(offsets) - 1)
    return np.concatenate(([0], np.cumsum(lengths))), pairs % classes


def class_mask(sample: StoredSample, way: UnifiedSource | None, classes: int) -> np.ndarray:
    """Of every class whether the image tells of it, uint8 [classes]: 0, UNKNOWN or NOT_EXHAUSTIVE.

    `sample` has unified labels, and all of them: a class that a crop has lost is known all the same.
    """
    mask = np.zeros(classes, np.uint8)
    if sample.federated is not None:
        mask[:] = UNKNOWN
        mask[sample.labels[sample.labels != LEFT_OUT]] = 0
        mask[sample.federated.negative] = 0
        mask[sample.federated.not_exhaustive] = NOT_EXHAUSTIVE
    if way is not None:
        mask[~way.known] = UNKNOWN
    return mask
