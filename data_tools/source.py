"""Iterate the samples of a packed source one by one, for the tools that look at all of them."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.encode import MAX_PIXELS
from mf_scale.data.decode import StoredSample
from mf_scale.data.index import Index
from mf_scale.data.reader import SampleReader
from mf_scale.data.samples import BadSample


def open_reader(index: Index) -> SampleReader:
    """Reader of single samples without a buffer."""
    return SampleReader(index, block_samples=1, budget=0, max_pixels=MAX_PIXELS)


def decoded_samples(index: Index) -> Iterator[tuple[int, StoredSample | BadSample]]:
    """Every sample in the order of the index, or why it does not decode."""
    reader = open_reader(index)
    for sample_id in range(index.samples):
        try:
            yield sample_id, reader.load_exact(sample_id)
        except BadSample as bad:
            yield sample_id, bad
