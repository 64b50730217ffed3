"""Scan: read a finished shard once -> its rows of the index, or everything that is wrong in it."""

from __future__ import annotations

import io
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from webdataset.tariterators import base_plus_ext

from data_tools.encode import MAX_PIXELS
from data_tools.files import file_checksum
from data_tools.histogram import Histogram, value_counts
from data_tools.problems import Problems
from mf_scale.data.decode import IMAGE_FORMATS, UNREADABLE, decode_map
from mf_scale.data.ids import LabelMember
from mf_scale.data.index import SCHEMA, Shard
from mf_scale.data.samples import IMAGE_SUFFIXES, BadSample, RawSample, assemble, safe_member
from mf_scale.data.storage import plain_name

ROWS = pa.schema([SCHEMA.field(i) for i in range(1, len(SCHEMA))])
"""Columns of one shard's rows: all but the shard's number."""
NUMBERS = ("offset", "size", "height", "width", "segments")
META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset's reader leaves out."""
FEDERATED = ("negative", "not_exhaustive")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
"""By the first two bytes of a file."""


@dataclass(frozen=True)
class ShardScan:
    """What the index needs to know of one shard."""

    shard: Shard
    rows: pa.Table
    """Of ROWS, one a sample."""
    values: Histogram = field(default_factory=Histogram)
    """With labels: what the label maps hold."""
    notes: dict[str, int] = field(default_factory=dict)
    """What the packer noted of its samples, by kind."""


def scan_shard(
    path: Path,
    num_classes: int,
    labels: LabelMember | None = None,
    table: np.ndarray | None = None,
    *,
    name: str | None = None,
    told: Callable[[int], object] = int,
) -> ShardScan | Problems:
    """Rows of a shard, or what is wrong: keys standing apart, double, missing or unreadable members, labels.

    A shard made elsewhere comes with `labels` and their `table` (IdMeaning.table of LABEL_VALUES). `name` where it is
    to be indexed under another one; `told` hears how many bytes further the scan is.
    """
    shown = name or path.name
    problems = Problems()
    rows = _Rows()
    values = Histogram()
    faults: dict[str, str] = {}
    apart: set[str] = set()
    size, reached = path.stat().st_size, 0
    try:
        for key, start, end, members in tar_samples(path, labels):
            told(end - reached)
            reached = end
            if key in rows.keys or key in faults:
                apart.add(key)
                continue
            try:
                raw = assemble(key, members, labels)
                shape, found = _listed(raw, num_classes) if table is None else _drawn(raw, table, values)
                rows.add(key, {"offset": start, "size": end - start, **shape}, found)
            except BadSample as bad:
                faults[key] = str(bad)
    except RecursionError:
        problems.add("tars that cannot be read", f"{shown}: thousands of headers for one long name")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, BadSample) as error:
        problems.add("tars that cannot be read", f"{shown}: {_compression(path) or error}")
    told(size - reached)
    for key in sorted(apart):
        problems.add("keys whose members stand apart", f"{key} in {shown}")
    for key in (key for key in faults if key not in apart):
        problems.add("samples that are incomplete or wrong", f"{key} in {shown}: {faults[key]}")
    if not rows.keys and not problems:
        problems.add("tars without a sample", shown)
    if problems:
        return problems
    shard = Shard(plain_name(shown), size, file_checksum(path), len(rows.keys))
    return ShardScan(shard, rows.table(), values)


def tar_samples(path: Path, labels: LabelMember | None = None) -> Iterator[tuple[str, int, int, dict[str, bytes]]]:
    """(key, first byte, byte behind the last, members by suffix) of each run of members with one key.

    Members that the index does not need are left empty: all but the json, or with labels image and label map.
    Raises tarfile.TarError and BadSample.
    """
    wanted = {"json"} if labels is None else {*IMAGE_SUFFIXES, labels.suffix.lower()}
    with _TarFile(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        current: tuple[str, int, dict[str, bytes]] | None = None
        end = 0
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep millions of them
            key, suffix = base_plus_ext(_safe(member))
            if not member.isreg() or key is None or META.match(member.name):
                continue
            if current and current[0] != key:
                yield current[0], current[1], end, current[2]
                current = None
            current = current or (key, member.offset, {})
            suffix = suffix.lower()
            if suffix in current[2]:
                raise BadSample(f"member {member.name} stands twice")
            end = tar.offset
            if end > path.stat().st_size:
                raise tarfile.ReadError(f"it ends inside {member.name}")
            stream = tar.extractfile(member) if suffix in wanted else None
            current[2][suffix] = stream.read() if stream else b""
        if current:
            yield current[0], current[1], end, current[2]
        file.seek(tar.offset)
        _check_end(file, tar.offset)


class _TarFile(io.BufferedReader):
    """A file that is asked for no more than it has: Python makes room for all that a header claims before it reads."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def _safe(member: tarfile.TarInfo) -> str:
    """The name of a member that may stand in a shard."""
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise BadSample(f"member {member.name} is a link, a device or sparse")
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise BadSample(f"the name of member {member.name!a} is not UTF-8") from None
    return safe_member(member.name)


def _check_end(file: io.BufferedReader, offset: int) -> None:
    """Behind the last member zeros must stand, and only these: tarfile takes a broken header, and none, for the end."""
    first = file.read(tarfile.BLOCKSIZE)
    if len(first) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without an end block: cut, or its writer was killed")
    if first.strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {offset} is broken")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"it goes on behind its end at byte {offset}, like tars joined by `cat`")


def _compression(path: Path) -> str:
    with path.open("rb") as file:
        kind = COMPRESSED.get(file.read(2))
    return f"it is compressed ({kind}), and a compressed tar has no bytes to point at: unpack it" if kind else ""


def _listed(raw: RawSample, num_classes: int) -> tuple[dict[str, int], np.ndarray]:
    """Size and number of segments of a sample in our layout, and its labels: all from its json."""
    try:
        labels = [int(s["label"]) for s in raw.meta["segments"]]
        shape = {"height": int(raw.meta["height"]), "width": int(raw.meta["width"]), "segments": len(labels)}
        federated = raw.meta.get("federated") or {}
        labels += [int(label) for name in FEDERATED for label in federated.get(name, ())]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise BadSample(f"its json lacks a field or has a wrong one: {type(error).__name__} {error}") from error
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise BadSample(f"label {wrong[0]} is outside the vocabulary of {num_classes} classes")
    return shape, np.unique(np.array(labels[: shape["segments"]], np.int32))


def _drawn(raw: RawSample, table: np.ndarray, values: Histogram) -> tuple[dict[str, int], np.ndarray]:
    """Size of a sample with a label map, and the labels on it; its values are added to `values`."""
    try:
        with Image.open(io.BytesIO(raw.image), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except UNREADABLE as error:
        raise BadSample(f"its image cannot be opened: {error}") from error
    if width * height > MAX_PIXELS:
        raise BadSample(f"its image has {width}x{height} pixels, above the limit of {MAX_PIXELS}")
    drawn = decode_map(raw.maps[0], (height, width))
    counts = value_counts(drawn)
    values.add(raw.key, counts, 8 * drawn.dtype.itemsize)
    meanings = table[list(counts)]
    found = np.unique(meanings[meanings >= 0])
    return {"height": height, "width": width, "segments": len(found)}, found


class _Rows:
    """Rows as flat columns: a dict a row would take a kilobyte each."""

    def __init__(self) -> None:
        self.keys: dict[str, None] = {}
        self._numbers = {name: array("q") for name in NUMBERS}
        self._labels, self._bounds = array("i"), array("q", [0])

    def add(self, key: str, numbers: dict[str, int], labels: np.ndarray) -> None:
        self.keys[key] = None
        for name in NUMBERS:
            self._numbers[name].append(numbers[name])
        self._labels.extend(labels.tolist())
        self._bounds.append(len(self._labels))

    def table(self) -> pa.Table:
        columns = {name: pa.array(np.asarray(numbers), pa.int64()) for name, numbers in self._numbers.items()}
        columns["key"] = pa.array(self.keys, pa.large_string())
        bounds, labels = pa.array(np.asarray(self._bounds)), pa.array(np.asarray(self._labels), pa.int32())
        columns["class_ids"] = pa.LargeListArray.from_arrays(bounds, labels)
        return pa.table([columns[name].cast(ROWS.field(name).type) for name in ROWS.names], schema=ROWS)
