"""An index made up for the bench: sizes and classes as a dataset has them, of shards that are not there."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mf_scale.data.index import COLUMNS, FORMAT, HEAD, SCHEMA, VERSION, head_digest
from mf_scale.errors import UserError
from mf_scale.rundir import disk_errors

SHARD_SAMPLES = 1000
SAMPLE_BYTES = 200_000
KEY_DIGITS = 12
MOST_CLASSES = 11
"""Of an image; 1 to that many, 6 on average."""
_CHUNK = 1 << 20
"""Samples that are made at once."""
_HOLE = 1 << 16
"""Bytes of a buffer from which on it is left out of the file at first."""


def write_index(folder: Path, samples: int, classes: int = 1000) -> int:
    """The two files of an index in `folder`; their bytes. Raises UserError where they do not fit on its disk.

    Classes are drawn with a long tail: class k about as often as 1/k. Memory does not grow with the samples.
    """
    path, needed = folder / COLUMNS, samples * (48 + KEY_DIGITS + 4 * (MOST_CLASSES + 1) // 2)
    if needed > (free := shutil.disk_usage(folder).free) * 0.9:
        raise UserError(
            f"an index of {samples:,} samples takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free",
            where=str(folder),
            remedy="Take fewer samples (--samples), or another disk (--folder).",
        )
    lists = sum(int(lengths.sum()) for _, _, lengths in _lengths(samples))
    with disk_errors(path):
        _write_layout(path, samples, lists)
        _fill(path, samples, classes)
        (folder / HEAD).write_text(json.dumps(_head(samples, classes, path.stat().st_size)))
    return path.stat().st_size + (folder / HEAD).stat().st_size


def _lengths(samples: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Chunk by chunk: first sample, the one behind the last, and how many classes each has, int64."""
    for first in range(0, samples, _CHUNK):
        end = min(first + _CHUNK, samples)
        generator = np.random.Generator(np.random.PCG64([1, first]))
        yield first, end, generator.integers(1, MOST_CLASSES + 1, end - first)


def _write_layout(path: Path, samples: int, lists: int) -> None:
    """The file as Arrow lays it out, with holes where the columns go: in one piece they do not fit into memory."""
    columns = [
        _empty(SCHEMA.field(name).type, samples, {"key": KEY_DIGITS * samples, "class_ids": lists}.get(name, 0))
        for name in SCHEMA.names
    ]
    with path.open("wb") as file:
        with pa.ipc.new_file(pa.PythonFile(_Holes(file), mode="w"), SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        file.truncate()


def _empty(kind: pa.DataType, samples: int, inside: int) -> pa.Array:
    """A column of zeros that nobody has touched, so that they take no memory; `inside`: bytes of texts, or values."""
    if kind == pa.large_string():
        return pa.Array.from_buffers(kind, samples, [None, _ends(samples, inside), _zeros(inside)], null_count=0)
    if pa.types.is_large_list(kind):
        values = _empty(kind.value_type, inside, 0)
        return pa.Array.from_buffers(kind, samples, [None, _ends(samples, inside)], null_count=0, children=[values])
    return pa.Array.from_buffers(kind, samples, [None, _zeros(kind.byte_width * samples)], null_count=0)


def _zeros(size: int) -> pa.Buffer:
    return pa.py_buffer(np.zeros(size, np.uint8))


def _ends(samples: int, last: int) -> pa.Buffer:
    """Where texts or lists end, of which the last is told at once: what lies behind it is not written."""
    ends = np.zeros(samples + 1, np.int64)
    ends[-1] = last
    return pa.py_buffer(ends)


class _Holes(io.RawIOBase):
    """A file that large pieces are left out of; they are filled in later."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self.file.tell())

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size < _HOLE:
            self.file.write(data)
        else:
            self.file.seek(size, io.SEEK_CUR)
        return size


def _fill(path: Path, samples: int, classes: int) -> None:
    source = pa.memory_map(str(path))
    base = source.read_buffer(source.size()).address
    source.seek(0)
    table = pa.ipc.open_file(source).read_all()
    data = np.memmap(path, np.uint8, "r+")

    def places(column: str, buffer: int, kind: Any) -> np.ndarray:
        """Where a buffer of a column lies in the file, to be written to."""
        found = table.column(column).chunk(0).buffers()[buffer]
        first = found.address - base
        whole: np.ndarray = data[first : first + found.size // np.dtype(kind).itemsize * np.dtype(kind).itemsize]
        return whole.view(kind)

    plain = {f.name: places(f.name, 1, f.type.to_pandas_dtype()) for f in SCHEMA if pa.types.is_integer(f.type)}
    keys, key_ends = places("key", 2, np.uint8), places("key", 1, np.int64)
    labels, list_ends = places("class_ids", 3, np.int32), places("class_ids", 1, np.int64)
    half = 10 ** (KEY_DIGITS // 2)
    digits = (np.arange(half)[:, None] // 10 ** np.arange(KEY_DIGITS // 2)[::-1] % 10 + ord("0")).astype(np.uint8)
    before = 0
    for first, end, lengths in _lengths(samples):
        rows, number = slice(first, end), np.arange(first, end)
        plain["shard"][rows], plain["offset"][rows] = number // SHARD_SAMPLES, number % SHARD_SAMPLES * SAMPLE_BYTES
        plain["size"][rows], plain["height"][rows], plain["width"][rows] = SAMPLE_BYTES, 480, 640
        plain["segments"][rows] = lengths
        key_ends[first + 1 : end + 1] = (number + 1) * KEY_DIGITS
        keys[first * KEY_DIGITS : end * KEY_DIGITS] = digits[np.stack(np.divmod(number, half), 1)].reshape(-1)
        list_ends[first + 1 : end + 1] = before + np.cumsum(lengths)
        drawn = np.random.Generator(np.random.PCG64([2, first])).random(int(lengths.sum()), np.float32)
        labels[before : before + len(drawn)] = np.minimum(np.exp(drawn * np.float32(np.log(classes))), classes) - 1
        before += len(drawn)
    data.flush()


def _head(samples: int, classes: int, size: int) -> dict[str, Any]:
    counts = np.diff(np.append(np.arange(0, samples, SHARD_SAMPLES), samples)).tolist()
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "samples": samples,
        "crowd": "none",
        "unlabelled": "none",
        "kind": "panoptic",
        "labels": None,
        "columns": {"name": COLUMNS, "size": size, "sha256": ""},
        "shards": [
            {"name": f"made-{i:06d}.tar", "size": n * SAMPLE_BYTES, "sha256": f"{i:064x}", "samples": n}
            for i, n in enumerate(counts)
        ],
        "vocabulary": {
            "name": "made",
            "classes": [{"name": f"class {i}", "thing": True, "source_id": i} for i in range(classes)],
        },
    }
    return {**head, "digest": head_digest(head)}
