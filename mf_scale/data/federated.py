"""Federated: whether the images of a source tell of every class, or only of those that somebody looked for (LVIS)."""

from __future__ import annotations

import numpy as np

from mf_scale.data.decode import StoredSample
from mf_scale.data.index import Index
from mf_scale.data.mapping import class_mask
from mf_scale.data.samples import BadSample, parse_sample
from mf_scale.errors import UserError

FEDERATED = "federated"
"""Field of a sample's JSON: the classes that were looked for and are not there, those not marked through."""
_LOOKS = 16
"""Samples that are looked at, the first of as many shards."""


def partly_known(index: Index) -> bool:
    """Whether some class is unknown in some image of the source: its batches have a class mask."""
    return (index.way is not None and not index.way.known.all()) or is_federated(index)


def is_federated(index: Index) -> bool:
    """Whether the samples of a source list what was looked for, as the first of its shards tell; kept by the index.

    Only instances are annotated so.
    """
    if index.kind != "instance" or index.labels is not None:
        return False
    if index.federated is None:
        starts = np.cumsum([0, *index.shard_samples])[:-1]
        starts = starts[np.array(index.shard_samples) > 0]
        looked_at = starts[np.linspace(0, len(starts) - 1, min(_LOOKS, len(starts))).astype(int)]
        index.federated = any(_lists(index, int(sample_id)) for sample_id in looked_at)
    return index.federated


def mask_row(sample: StoredSample, index: Index, masked: bool) -> np.ndarray | None:
    """Class mask of a sample of the index, uint8 [K]; None in a run without. UserError where one is needed."""
    if masked:
        return class_mask(sample, index.way, len(index.vocabulary))
    if sample.federated is None:
        return None
    raise UserError(
        f"sample {sample.key} lists which classes were looked for in it, and the first samples of the shards do not",
        where=index.source,
        remedy="Make a source of its own of those that do, and name both in data.sources.",
    )


def _lists(index: Index, sample_id: int) -> bool:
    record = index.sample(sample_id)
    try:
        raw = parse_sample(index.storage.read(record.shard, record.offset, record.size), record.key)
    except BadSample:
        return False
    return raw.meta.get(FEDERATED) is not None
