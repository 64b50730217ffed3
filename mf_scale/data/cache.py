"""Cache: the storage of a source that keeps pieces of its shards in a local folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from mf_scale.config.schema import DataConfig
from mf_scale.data.pieces import DIGEST, PIECE, CacheSettings, PieceCache
from mf_scale.data.storage import Storage
from mf_scale.errors import UserError

__all__ = ["CacheSettings", "CachedStorage", "Content", "cache_settings", "open_storage"]

GIB = 1 << 30


class Content(NamedTuple):
    """What a shard is, by its index."""

    sha256: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class _Part:
    """What a read wants of one piece."""

    number: int
    length: int
    """Bytes of the whole piece."""
    start: int
    stop: int
    """Inside the piece."""
    found: bytes | None


class CachedStorage(Storage):
    """Reads of shards go through the cache; all else, and what the cache lacks, to the source."""

    def __init__(self, source: str, settings: CacheSettings, shards: Mapping[str, Content]) -> None:
        super().__init__(source)
        self.settings, self.shards = settings, dict(shards)
        self._cache = PieceCache(settings)
        if wrong := [name for name, content in shards.items() if not DIGEST.fullmatch(content.sha256)]:
            raise UserError(f"the index has no sha256 of {wrong[0]}", where=self.source, remedy="Make it again.")

    def __reduce__(self) -> tuple[type[Storage], tuple[Any, ...]]:
        return CachedStorage, (self.source, self.settings, self.shards)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """As Storage's; raises the same."""
        content = self.shards.get(name)
        if content is None or not 0 <= offset < offset + size <= content.size:
            return super().read(name, offset, size)
        parts = [self._look(content, number, offset, size) for number in _pieces(offset, size)]
        data = bytearray()
        for missing, run in groupby(parts, key=lambda part: part.found is None):
            if missing:
                data += self._fetch(name, content, list(run))
            else:
                data += b"".join(part.found or b"" for part in run)
        return bytes(data)

    def _look(self, content: Content, number: int, offset: int, size: int) -> _Part:
        begin = number * PIECE
        length = min(PIECE, content.size - begin)
        start, stop = max(0, offset - begin), min(length, offset + size - begin)
        return _Part(number, length, start, stop, self._cache.load(content.sha256, number, length, start, stop))

    def _fetch(self, name: str, content: Content, run: list[_Part]) -> memoryview:
        """What is wanted of neighbouring pieces, from the source in one read: whole pieces where they can be kept."""
        whole = self._cache.storing
        begin = run[0].number * PIECE + (0 if whole else run[0].start)
        end = run[-1].number * PIECE + (run[-1].length if whole else run[-1].stop)
        data = memoryview(super().read(name, begin, end - begin))
        for part in run if whole else ():
            at = part.number * PIECE - begin
            self._cache.store(content.sha256, part.number, bytes(data[at : at + part.length]))
        wanted = run[0].number * PIECE + run[0].start - begin
        return data[wanted : run[-1].number * PIECE + run[-1].stop - begin]


def cache_settings(data: DataConfig) -> CacheSettings | None:
    """The cache that a configuration asks for."""
    return CacheSettings(data.cache_dir, int(data.cache_gib * GIB)) if data.cache_dir else None


def open_storage(source: str, cache: CacheSettings | None, shards: Mapping[str, Content]) -> Storage:
    """The storage of a source: through the cache where there is one and the source does not lie on its disk."""
    storage = Storage(source)
    return CachedStorage(source, cache, shards) if cache and not _on_disk_of(storage, cache) else storage


def _on_disk_of(storage: Storage, cache: CacheSettings) -> bool:
    """Whether a source is a folder on the file system that the cache is on, so that keeping it again gains nothing."""
    if storage.scheme:
        return False
    folder = Path(cache.folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return Path(storage.source).stat().st_dev == there.stat().st_dev


def _pieces(offset: int, size: int) -> range:
    return range(offset // PIECE, (offset + size - 1) // PIECE + 1)
