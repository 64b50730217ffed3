"""Records: what a dataset format hands to the packer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mf_scale.data.ids import IdMeaning
from mf_scale.vocabulary import Vocabulary

HASHED = 1 << 28
"""Bytes of label maps that are read for a fingerprint."""


class BadRecord(Exception):  # noqa: N818 - a finding about the source, collected and told with the others
    """A record whose files contradict each other; the text says how."""


@dataclass(frozen=True)
class RecordSegment:
    """One segment of an annotation."""

    label: int
    layer: int
    thing: bool
    crowd: bool
    source_id: int
    """The segment's id in the annotation files."""


@dataclass(frozen=True)
class Annotation:
    """Segments of one image."""

    segment_map: np.ndarray
    """int32 [L,H,W]: index into segments, NONE or IGNORE."""
    segments: list[RecordSegment]
    federated: dict[str, list[int]] | None = None
    """Where only some classes were looked for (LVIS): labels verified `negative`, and `not_exhaustive` ones."""
    notes: dict[str, int] = field(default_factory=dict)
    """Worth telling, counted by kind: shapes without a pixel, objects outside the vocabulary, …"""


@dataclass(frozen=True)
class Record:
    """One image with where its annotation is to be found; small, sent to the packing processes."""

    key: str
    """Unique in the source; no dot, since a dot ends the key in a shard."""
    image: Path
    origin: dict[str, Any]
    """Where the sample comes from; stored with it."""
    payload: Any
    """What the format needs to annotate it."""


@dataclass(frozen=True)
class FormatSource:
    """A source in some format, read so far as its lists go."""

    vocabulary: Vocabulary
    records: list[Record]
    annotate: Callable[[Record], Annotation]
    """Reads the pixels of a record's annotation; a plain function. Raises BadRecord."""
    fingerprint: str
    """Changes with the annotation."""
    kind: str
    """panoptic | semantic | instance, as in `mf_scale.data.index.KINDS`."""
    ids: IdMeaning | None = None
    """What the values of its label maps mean; none where the format lists its segments."""
    values: Callable[[Record], np.ndarray] | None = None
    """Values of a record's label map as stored, integer [H,W], for the check of ids; a plain function. With `ids`."""
    notes: dict[str, int] = field(default_factory=dict)
    """Worth telling of the lists, counted by kind: images without annotation, …"""


def spread_over(records: list[Record], most: int) -> list[Record]:
    """`most` of the records (0: all), evenly from the first to the last."""
    if not most or most >= len(records):
        return records
    return [records[i] for i in np.linspace(0, len(records) - 1, most).round().astype(int)]


def fingerprint(lists: Iterable[Path], maps: Iterable[Path] = ()) -> str:
    """sha256 over the contents of lists, and over the places and contents of maps.

    Of maps above HASHED bytes together, which would take minutes to read, size and time of change (mtime_ns) stand
    for the contents: a corrected map often keeps its size. Such a source has to be copied with its times kept
    (cp -p, rsync -t) where several machines pack parts of it; of smaller ones any copy is as good. A place is told
    from the folder that all maps share, so that it does not matter where a copy lies.
    """
    digest = hashlib.sha256()
    for path in lists:
        digest.update(_digest(path))
    found = [(path, path.stat()) for path in maps]
    shared = os.path.commonpath([path.parent for path, _ in found]) if found else ""
    read = sum(status.st_size for _, status in found) <= HASHED
    for path, status in found:
        digest.update(os.fsencode(path.relative_to(shared)) + b"\0")
        digest.update(_digest(path) if read else f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
