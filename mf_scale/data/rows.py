"""Rows: what the columns of an index must fulfil before anything is read by them. They are untrusted, as all data."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_CHUNK = 1 << 18
"""Rows that are looked at together: what is compared takes no memory to speak of."""


def check_rows(table: pa.Table, shard_sizes: np.ndarray, shard_samples: np.ndarray, num_classes: int) -> None:
    """Raise ValueError (pyarrow's kind too) unless every row lies in its shard, behind the row before it.

    `shard_sizes`, `shard_samples`: int64 [shards]. A million rows take 50 ms.
    """
    table.validate(full=True)  # else an offset that points nowhere is read from there
    empty = [name for name in table.column_names if table.column(name).null_count]
    if empty:
        raise ValueError(f"column {empty[0]} has rows without a value")
    shard, offset, size = (table.column(name).chunk(0).to_numpy() for name in ("shard", "offset", "size"))
    ends = np.cumsum(shard_samples)
    if (shard_samples < 0).any() or len(shard) != (ends[-1] if len(ends) else 0):
        raise ValueError("its rows are not as many as its shards hold")
    for first in range(0, len(shard), _CHUNK):
        end = min(first + _CHUNK, len(shard))
        rows = slice(max(first - 1, 0), end)  # with the row before: it may not reach into the first
        true = np.searchsorted(ends, np.arange(rows.start, end), side="right")
        _check_chunk(shard[rows], true, shard_sizes, offset[rows], size[rows])
    lists = table.column("class_ids").chunk(0)
    labels = lists.values.to_numpy()[lists.offsets[0].as_py() : lists.offsets[-1].as_py()]  # flatten() copies
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"a class id is outside the vocabulary of {num_classes} classes")


def _check_chunk(
    shard: np.ndarray, true_shard: np.ndarray, sizes: np.ndarray, offset: np.ndarray, size: np.ndarray
) -> None:
    if (shard != true_shard).any():
        raise ValueError("its rows are not in the order of the shards")
    if (offset < 0).any() or (size <= 0).any() or (size > sizes[true_shard] - offset).any():
        raise ValueError("a sample lies outside its shard")
    if ((offset[1:] < offset[:-1] + size[:-1]) & (shard[1:] == shard[:-1])).any():
        raise ValueError("two samples overlap")
