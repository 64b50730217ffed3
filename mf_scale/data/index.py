"""The shard index: `index.json` (head) and `samples.arrow` (one row a sample, memory-mapped) beside the shards.

`data_tools.index` writes it; here it is read and checked. A sample's (offset, size) is the stretch of its shard
that holds all its members with their tar headers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mf_scale.data.cache import CacheSettings, Content, open_storage
from mf_scale.data.ids import LabelMember
from mf_scale.data.mapping import mapped_lists
from mf_scale.data.rows import check_rows
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
REMEDY = "Make it with `python -m data_tools pack` (or `index` for shards made elsewhere)."


@dataclass(frozen=True)
class Shard:
    """One tar of a source."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    samples: int


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
    """sha256 of the head without its digest: shards, columns, vocabulary and treatment, so all of the source."""
    text = json.dumps({k: v for k, v in head.items() if k != "digest"}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
        self.shards = tuple(Shard(**shard) for shard in head["shards"])
        self.storage = open_storage(source, cache, {s.name: Content(s.sha256, s.size) for s in self.shards})
        self.digest = str(head["digest"])
        self.crowd, self.unlabelled = str(head["crowd"]), str(head["unlabelled"])
        self.kind = str(head["kind"])
        labels = head["labels"]
        self.labels = None if labels is None else LabelMember.from_dict(labels, where=f"{source}/{HEAD}")
        self.columns = dict(head["columns"])
        self.table = table
        self.samples = table.num_rows

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
            check_rows(index.table, [s.size for s in index.shards], index.shard_samples, len(index.vocabulary))
        except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise UserError(
                f"the index is malformed: {type(error).__name__} {error}", where=where, remedy=REMEDY
            ) from error
        if index.samples != sum(s.samples for s in index.shards) or index.samples == 0:
            raise UserError("the index counts its samples wrongly or has none", where=where, remedy=REMEDY)
        return index

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        seen = None if self.vocabulary is self.packed else (self.vocabulary, self.way)
        return _reopen, (self.source, self.digest, self.cache, seen)

    def seen_as(self, vocabulary: Vocabulary, way: UnifiedSource | None) -> Index:
        """The same source with its labels mapped into another vocabulary; `way` None: the labels stay as they are."""
        seen = copy(self)
        seen.vocabulary, seen.way = vocabulary, way
        return seen

    @cached_property
    def shard_samples(self) -> list[int]:
        """Samples of each shard, in order."""
        return [s.samples for s in self.shards]

    def column(self, name: str) -> np.ndarray:
        """A number column as a view of the mapped file: shard, offset, size, height, width, segments."""
        return self.table.column(name).chunk(0).to_numpy(zero_copy_only=True)

    def sample(self, i: int) -> SampleRecord:
        """Row of sample `i`, 0 <= i < samples."""
        row = {name: self.table.column(name)[i].as_py() for name in SCHEMA.names}
        return SampleRecord(**{**row, "shard": self.shards[row["shard"]].name})

    def class_lists(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Classes of samples first..end: where each list begins and ends, int64 [n+1], and labels."""
        lists = self.table.column("class_ids").chunk(0)[first:end]
        offsets = lists.offsets.to_numpy()
        offsets, labels = offsets - offsets[0], lists.values.to_numpy()[offsets[0] : offsets[-1]]
        return (offsets, labels) if self.way is None else mapped_lists(offsets, labels, self.way)

    def class_counts(self) -> np.ndarray:
        """Images that hold each class, int64 [K]."""
        counts = np.zeros(len(self.vocabulary), np.int64)
        for first in range(0, self.samples, _COUNTED):
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
