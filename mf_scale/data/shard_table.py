"""Shard table: the tars of a source as columns, since a hundred thousand objects would be copied into every worker."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

_KEYS = {"name", "size", "sha256", "samples"}


@dataclass(frozen=True)
class Shard:
    """One tar of a source."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    samples: int


class ShardTable(Sequence[Shard]):
    """The shards of a source, made when they are asked for."""

    def __init__(self, sizes: np.ndarray, samples: np.ndarray, names: bytes, sha256s: bytes) -> None:
        self.sizes, self.samples = sizes, samples
        """int64 [shards]: bytes, samples."""
        self._names, self._sha256s = _Texts(names), _Texts(sha256s)

    @staticmethod
    def from_head(shards: Iterable[Mapping[str, Any]]) -> ShardTable:
        """From the dictionaries of an index's head; raises TypeError, KeyError, ValueError for other things."""
        rows = list(shards)
        for row in rows:
            if row.keys() != _KEYS or not isinstance(row["name"], str) or not isinstance(row["sha256"], str):
                raise TypeError("a shard needs name, size, sha256 and samples, and nothing else")
        sizes, samples = (_whole(row[key] for row in rows) for key in ("size", "samples"))
        names, sha256s = (_joined(row[key] for row in rows) for key in ("name", "sha256"))
        return ShardTable(sizes, samples, names, sha256s)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, at: int) -> Shard: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Shard]: ...
    def __getitem__(self, at: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        i = range(len(self))[at]
        return Shard(self._names[i], int(self.sizes[i]), self._sha256s[i], int(self.samples[i]))

    def __iter__(self) -> Iterator[Shard]:
        return (self[i] for i in range(len(self)))


class _Texts:
    """Texts in one stretch of bytes, a line each."""

    def __init__(self, lines: bytes) -> None:
        self._lines = lines
        self._ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))

    def __getitem__(self, i: int) -> str:
        first = int(self._ends[i - 1]) + 1 if i else 0
        return self._lines[first : int(self._ends[i])].decode(errors="surrogatepass")


def _joined(texts: Iterable[str]) -> bytes:
    """Raises ValueError for a text of several lines, which no name of a file is."""
    lines = list(texts)
    joined = "".join(f"{text}\n" for text in lines)
    if joined.count("\n") != len(lines):
        raise ValueError("the name of a shard has a line break")
    return joined.encode(errors="surrogatepass")


def _whole(numbers: Iterable[Any]) -> np.ndarray:
    """int64 of ints; raises TypeError for other things, which numpy would round, ValueError for those too large."""
    try:
        return np.array([operator.index(number) for number in numbers], np.int64)
    except OverflowError as error:
        raise ValueError("a number of a shard has more than 64 bits") from error
