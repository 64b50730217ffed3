"""The shard index: `index.json` (head) and `samples.arrow` (one row a sample, memory-mapped) beside the shards.

`data_tools.index` writes it; here it is read and checked. A sample's (offset, size) is the stretch of its shard
that holds all its members with their tar headers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mf_scale.data.blocks import block_bounds
from mf_scale.data.cache import CacheSettings, Content, open_storage
from mf_scale.data.ids import LabelMember
from mf_scale.data.kept import kept_array
from mf_scale.data.mapping import mapped_lists
from mf_scale.data.rows import check_rows
from mf_scale.data.shard_table import Shard, ShardTable
from mf_scale.data.storage import Storage, StorageError
from mf_scale.errors import UserError
from mf_scale.unify import UnifiedSource
from mf_scale.vocabulary import Vocabulary

HEAD = "index.json"
COLUMNS = "samples.arrow"
FORMAT = "mf_scale-index"
VERSION = 2
TREATMENTS = ("none", "ignore")
"""What crowd and unlabelled pixels become in training: a negative of every segment, or outside the loss."""
KINDS = {
    "panoptic": ("panoptic", "semantic", "instance"),
    "semantic": ("semantic",),
    "instance": ("instance", "semantic"),
}
"""Kinds of annotation, and the tasks each can serve: a segment of a semantic one is a class, not an instance."""
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("key", pa.large_string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("class_ids", pa.large_list(pa.int32())),
        pa.field("segments", pa.int32()),
    ]
)
CHUNK = 8 << 20
"""Bytes read at once for a checksum."""
_COUNTED = 1 << 18
"""Samples whose classes are counted at once."""
_DUMPED = 1024
"""Shards of the head that are written as text at once for its digest."""
_ROWS_FORM = 1
"""Of the checks of all rows."""
REMEDY = "Make it with `python -m data_tools pack` (or `index` for shards made elsewhere)."


@dataclass(frozen=True)
class SampleRecord:
    """One row of the index."""

    shard: str
    key: str
    offset: int
    size: int
    height: int
    width: int
    class_ids: list[int]
    segments: int


def head_digest(head: Mapping[str, Any]) -> str:
    """sha256 of the head without its digest: shards, columns, vocabulary and treatment, so all of the source.

    The text is json.dumps of the whole, written in pieces: a hundred thousand shards would take 100 MiB at once.
    """
    digest = hashlib.sha256(b"{")
    for number, name in enumerate(sorted(head.keys() - {"digest"})):
        digest.update(f"{', ' if number else ''}{json.dumps(name, ensure_ascii=False)}: ".encode())
        for piece in _dumped(head[name]):
            digest.update(piece.encode())
    digest.update(b"}")
    return digest.hexdigest()


def _dumped(value: Any) -> Iterator[str]:
    """json.dumps(value, sort_keys=True, ensure_ascii=False) in pieces."""
    if not isinstance(value, list) or not value:
        yield json.dumps(value, sort_keys=True, ensure_ascii=False)
        return
    for first in range(0, len(value), _DUMPED):
        part = json.dumps(value[first : first + _DUMPED], sort_keys=True, ensure_ascii=False)
        yield (", " if first else "[") + part[1:-1]
    yield "]"


class Index:
    """A source opened for reading. Pickles as its path, so worker processes map the columns themselves."""

    def __init__(
        self, source: str, head: Mapping[str, Any], table: pa.Table, cache: CacheSettings | None = None
    ) -> None:
        self.source, self.cache = source, cache
        self.packed = self.vocabulary = Vocabulary.from_dict(head["vocabulary"], where=f"{source}/{HEAD}")
        """Of the labels as they are packed, and of those that everything else has to do with."""
        self.way: UnifiedSource | None = None
        """From the packed labels to those of `vocabulary`; None: they are the same."""
        self.federated: bool | None = None
        """Whether its samples list which classes were looked for; None: nobody has asked yet (`is_federated`)."""
        self.shards = ShardTable.from_head(head["shards"])
        self.storage = open_storage(
            source, cache, {s.name: Content(s.sha256, s.size) for s in self.shards} if cache else {}
        )
        self.digest = str(head["digest"])
        self.crowd, self.unlabelled = str(head["crowd"]), str(head["unlabelled"])
        self.kind = str(head["kind"])
        labels = head["labels"]
        self.labels = None if labels is None else LabelMember.from_dict(labels, where=f"{source}/{HEAD}")
        self.columns = dict(head["columns"])
        self.table = table
        self.samples = table.num_rows
        self._bounds: dict[int, np.ndarray] = {}

    @staticmethod
    def open(source: str | Path, cache: CacheSettings | None = None) -> Index:
        """Open the source (folder or url prefix), its shards through `cache` if it is remote.

        Raises UserError where its index is missing or malformed.
        """
        storage = Storage(str(source))
        where = f"{storage.source}/{HEAD}"
        folder = storage.local_path(HEAD)
        if folder is not None and not folder.is_file():
            raise UserError("there is no index of shards here", where=where, remedy=REMEDY)
        try:
            head = json.loads(storage.read_all(HEAD))
            _check_head(head, where)
            index = Index(storage.source, head, _open_table(storage, head["columns"]), cache)
            kept_array(index, ("rows", _ROWS_FORM), index._check_rows, lambda found: True)
        except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise UserError(
                f"the index is malformed: {type(error).__name__} {error}", where=where, remedy=REMEDY
            ) from error
        if index.samples != index.shard_samples.sum() or index.samples == 0:
            raise UserError("the index counts its samples wrongly or has none", where=where, remedy=REMEDY)
        return index

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        seen = None if self.vocabulary is self.packed else (self.vocabulary, self.way)
        return _reopen, (self.source, self.digest, self.cache, seen)

    def seen_as(self, vocabulary: Vocabulary, way: UnifiedSource | None) -> Index:
        """The same source with its labels mapped into another vocabulary; `way` None: the labels stay as they are."""
        seen = object.__new__(Index)  # not copy.copy, which does as pickle and would open it again
        vars(seen).update(vars(self))
        seen.vocabulary, seen.way = vocabulary, way
        return seen

    @property
    def shard_samples(self) -> np.ndarray:
        """Samples of each shard in order, int64 [shards]."""
        return self.shards.samples

    @property
    def identity(self) -> tuple[Any, ...]:
        """What changes when the bytes of its files do: the digest, and how the kernel knows a local file of columns."""
        path = self.storage.local_path(self.columns["name"])
        if path is None:
            return self.digest, self.columns["sha256"]
        found = path.stat()
        return self.digest, str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def block_bounds(self, block_samples: int) -> np.ndarray:
        """`order.block_bounds` of its shards, int64 [blocks+1]; made once, so that forked workers share it."""
        if block_samples not in self._bounds:
            self._bounds[block_samples] = block_bounds(self.shard_samples, block_samples)
        return self._bounds[block_samples]

    def _check_rows(self) -> np.ndarray:
        check_rows(self.table, self.shards.sizes, self.shard_samples, len(self.packed))
        return np.array([self.samples])

    def column(self, name: str) -> np.ndarray:
        """A number column as a view of the mapped file: shard, offset, size, height, width, segments."""
        return self.table.column(name).chunk(0).to_numpy(zero_copy_only=True)

    def sample(self, i: int) -> SampleRecord:
        """Row of sample `i`, 0 <= i < samples."""
        row = {name: self.table.column(name)[i].as_py() for name in SCHEMA.names}
        return SampleRecord(**{**row, "shard": self.shards[row["shard"]].name})

    def packed_lists(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Packed labels of samples first..end: where each begins and ends, int64 [n+1], and int32; views from 0 on."""
        lists = self.table.column("class_ids").chunk(0)[first:end]
        offsets = lists.offsets.to_numpy()
        labels = lists.values.to_numpy()[offsets[0] : offsets[-1]]
        return offsets - offsets[0] if offsets[0] else offsets, labels

    def class_lists(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Classes of samples first..end, likewise: of `vocabulary`, int64 where labels are mapped."""
        offsets, labels = self.packed_lists(first, end)
        return (offsets, labels) if self.way is None else mapped_lists(offsets, labels, self.way)

    def class_counts(self) -> np.ndarray:
        """Images that hold each class, int64 [K]."""
        counts = np.zeros(len(self.vocabulary), np.int64)
        for first in range(0, self.samples, _COUNTED):  # bincount takes a copy of eight bytes each
            _, labels = self.class_lists(first, min(first + _COUNTED, self.samples))
            counts += np.bincount(labels, minlength=len(counts))
        return counts


def verify_shards(index: Index, *, checksums: bool) -> None:
    """Every shard is there with the indexed size (and checksum); UserError naming those that are not."""
    wrong = [f"{shard.name} {fault}" for shard in index.shards if (fault := _shard_fault(index, shard, checksums))]
    if wrong:
        listed = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(
            f"{len(wrong)} of {len(index.shards)} shards differ from the index: {listed}",
            where=index.source,
            remedy="Restore the shards, or pack (or index) the source again.",
        )


def _shard_fault(index: Index, shard: Shard, checksums: bool) -> str:
    try:
        size = index.storage.size(shard.name)
    except StorageError:
        raise  # the network's fault says nothing about the shard
    except UserError:
        return "is missing or unreadable"
    if size != shard.size:
        return f"has {size} bytes instead of {shard.size}"
    if checksums and checksum(Storage(index.source), shard.name, shard.size) != shard.sha256:
        return "has another checksum"
    return ""


def checksum(storage: Storage, name: str, size: int) -> str:
    """sha256 of a file of the source."""
    digest = hashlib.sha256()
    for offset in range(0, size, CHUNK):
        digest.update(storage.read(name, offset, min(CHUNK, size - offset)))
    return digest.hexdigest()


def _reopen(
    source: str,
    digest: str,
    cache: CacheSettings | None,
    seen: tuple[Vocabulary, UnifiedSource | None] | None = None,
) -> Index:
    index = Index.open(source, cache)
    if index.digest != digest:
        raise UserError("the index changed while it was in use", where=source, remedy="Start the run again.")
    return index if seen is None else index.seen_as(*seen)


def _check_head(head: Mapping[str, Any], where: str) -> None:
    if head.get("format") != FORMAT or head.get("version") != VERSION:
        raise UserError(
            f"this is not an index of version {VERSION}: it says {head.get('format')!r} {head.get('version')!r}",
            where=where,
            remedy=REMEDY,
        )
    if head["digest"] != head_digest(head):
        raise UserError("the index was changed by hand: its digest does not fit", where=where, remedy=REMEDY)
    if head["crowd"] not in TREATMENTS or head["unlabelled"] not in TREATMENTS:
        raise UserError(f"crowd and unlabelled must be one of {TREATMENTS}", where=where, remedy=REMEDY)
    if head["kind"] not in KINDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}", where=where, remedy=REMEDY)


def _open_table(storage: Storage, columns: Mapping[str, Any]) -> pa.Table:
    path = storage.local_path(columns["name"])
    if storage.size(columns["name"]) != columns["size"]:
        raise ValueError(f"{columns['name']} does not have the {columns['size']} bytes that {HEAD} says")
    data = pa.memory_map(str(path)) if path is not None else pa.BufferReader(_fetched(storage, columns))
    # Without its thread pool: a mapped table needs none, and loader workers are forked from this process.
    table = pa.ipc.open_file(data, options=pa.ipc.IpcReadOptions(use_threads=False)).read_all()
    if table.schema != SCHEMA or table.column(0).num_chunks != 1:
        raise ValueError(f"{columns['name']} has other columns than an index has")
    return table


def _fetched(storage: Storage, columns: Mapping[str, Any]) -> bytes:
    data = storage.read_all(columns["name"])
    if hashlib.sha256(data).hexdigest() != columns["sha256"]:
        raise ValueError(f"{columns['name']} is not the file that {HEAD} describes")
    return data
