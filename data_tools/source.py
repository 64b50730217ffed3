"""Read the samples of a packed source, for the tools that look at all of them: run by run, in several processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from data_tools.encode import MAX_PIXELS
from mf_scale.data.decode import StoredSample
from mf_scale.data.index import Index
from mf_scale.data.reader import SampleReader
from mf_scale.data.samples import BadSample
from mf_scale.errors import UserError

RUN_SAMPLES = 64
RUN_BYTES = 32 << 20
"""A run ends where it has so many samples or bytes; it is read at once."""


@dataclass(frozen=True)
class Run:
    """Consecutive samples of one shard: first <= id < end."""

    shard: int
    first: int
    end: int


def open_reader(index: Index) -> SampleReader:
    """Reader of single samples without a buffer."""
    return SampleReader(index, block_samples=1, budget=0, max_pixels=MAX_PIXELS)


@lru_cache(maxsize=1)
def reader_of(source: str, digest: str) -> SampleReader:
    """The reader of this process, opened once; UserError where the index is no longer the one with this digest."""
    index = Index.open(source)
    if index.digest != digest:
        raise UserError("the index changed while it was read", where=source, remedy="Run the same command again.")
    return open_reader(index)


def sample_runs(index: Index) -> list[Run]:
    """All samples in runs, in the order of the index."""
    offset, size = index.column("offset").tolist(), index.column("size").tolist()
    runs, first = [], 0
    for shard, samples in enumerate(index.shard_samples):
        start, end = first, first + samples
        for i in range(start, end):
            if i + 1 - first == RUN_SAMPLES or i + 1 == end or offset[i + 1] + size[i + 1] - offset[first] > RUN_BYTES:
                runs.append(Run(shard, first, i + 1))
                first = i + 1
    return runs


def decoded_run(reader: SampleReader, run: Run) -> Iterator[tuple[int, StoredSample | BadSample]]:
    """The samples of a run, read at once, or why one does not decode."""
    index = reader.index
    offset, size = index.column("offset"), index.column("size")
    start = int(offset[run.first])
    data = index.storage.read(index.shards[run.shard].name, start, int(offset[run.end - 1] + size[run.end - 1]) - start)
    yield from decoded(reader, run, data, start)


def decoded(reader: SampleReader, run: Run, data: bytes, start: int) -> Iterator[tuple[int, StoredSample | BadSample]]:
    """The samples of a run from its bytes, which begin at byte `start` of the shard."""
    offset, size = reader.index.column("offset"), reader.index.column("size")
    for i in range(run.first, run.end):
        at = int(offset[i]) - start
        try:
            yield i, reader.decode(i, data[at : at + int(size[i])])
        except BadSample as bad:
            yield i, bad
