"""Index: read finished shards once and write `samples.arrow`, then `index.json`. The packer and `index` share it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.problems import Problems
from mf_scale.data.ids import LabelMember
from mf_scale.data.index import COLUMNS, FORMAT, HEAD, SCHEMA, VERSION, Shard, head_digest
from mf_scale.data.samples import BadSample, RawSample, assemble, safe_member
from mf_scale.data.storage import plain_name
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

CHUNK = 8 << 20
"""Bytes read at once for a checksum."""
META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset's reader leaves out."""


@dataclass(frozen=True)
class ShardScan:
    """What the index needs to know of one shard."""

    shard: Shard
    rows: list[dict[str, Any]]
    """Columns of each sample but its shard number."""


def scan_shard(path: Path, num_classes: int) -> ShardScan:
    """Read a shard; UserError with all that is wrong in it: keys standing apart, double or missing members, labels."""
    problems = Problems()
    rows: dict[str, dict[str, Any]] = {}
    incomplete: dict[str, str] = {}
    apart: set[str] = set()
    try:
        for key, start, end, members in tar_samples(path):
            if key in rows or key in incomplete:
                apart.add(key)
                continue
            try:
                rows[key] = _row(assemble(key, members), start, end, num_classes)
            except BadSample as bad:
                incomplete[key] = str(bad)
    except (tarfile.TarError, EOFError, BadSample) as error:
        problems.add("tar that cannot be read", f"{type(error).__name__} {error}")
    for key in sorted(apart):
        problems.add("keys whose members stand apart", key)
    for key in incomplete.keys() - apart:
        problems.add("samples that are incomplete or wrong", f"{key}: {incomplete[key]}")
    if not rows and not problems:
        problems.add("tar without a sample", path.name)
    problems.refuse("this shard cannot be indexed", where=str(path), remedy="Repair it or take it out of the folder.")
    return ShardScan(
        Shard(plain_name(path.name), path.stat().st_size, file_checksum(path), len(rows)), list(rows.values())
    )


def tar_samples(path: Path) -> Iterator[tuple[str, int, int, dict[str, bytes]]]:
    """(key, first byte, byte behind the last, members by suffix) of each run of members with one key.

    Image bytes are left out (empty): an index does not need them. Raises tarfile.TarError and BadSample.
    """
    from webdataset.tariterators import base_plus_ext

    with tarfile.open(path, "r:") as tar:
        current: tuple[str, int, dict[str, bytes]] | None = None
        end = 0
        for member in tar:
            key, suffix = base_plus_ext(safe_member(member.name))
            if not member.isreg() or key is None or META.match(member.name):
                continue
            if current and current[0] != key:
                yield current[0], current[1], end, current[2]
                current = None
            current = current or (key, member.offset, {})
            if suffix.lower() in current[2]:
                raise BadSample(f"member {member.name} stands twice")
            current[2][suffix.lower()] = _content(tar, member) if suffix.lower() == "json" else b""
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if end > path.stat().st_size:
                raise tarfile.ReadError(f"it ends inside {member.name}")
        if current:
            yield current[0], current[1], end, current[2]


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream else b""


def _row(raw: RawSample, start: int, end: int, num_classes: int) -> dict[str, Any]:
    try:
        labels = [int(s["label"]) for s in raw.meta["segments"]]
        height, width = int(raw.meta["height"]), int(raw.meta["width"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadSample(f"its json lacks a field or has a wrong one: {type(error).__name__} {error}") from error
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise BadSample(f"label {wrong[0]} is outside the vocabulary of {num_classes} classes")
    return {
        "key": raw.key,
        "offset": start,
        "size": end - start,
        "height": height,
        "width": width,
        "class_ids": sorted(set(labels)),
        "segments": len(labels),
    }


def write_index(
    folder: Path,
    vocabulary: Vocabulary,
    scans: Iterable[ShardScan],
    *,
    crowd: str,
    unlabelled: str,
    kind: str,
    labels: LabelMember | None = None,
) -> dict[str, Any]:
    """Write the columns, then the head, each under another name first; returns the head."""
    scans = list(scans)
    _refuse_double_keys(scans, folder)
    rows = [{"shard": number, **row} for number, scan in enumerate(scans) for row in scan.rows]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    columns = folder / COLUMNS
    partial = columns.with_name(COLUMNS + ".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table.combine_chunks())
    publish(partial, columns)
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "samples": len(rows),
        "crowd": crowd,
        "unlabelled": unlabelled,
        "kind": kind,
        "labels": labels.to_dict() if labels else None,
        "columns": {"name": COLUMNS, "size": columns.stat().st_size, "sha256": file_checksum(columns)},
        "shards": [asdict(scan.shard) for scan in scans],
        "vocabulary": vocabulary.to_dict(),
    }
    head["digest"] = head_digest(head)
    write_json(folder / HEAD, head)
    return head


def index_source(
    folder: Path, vocabulary: Vocabulary, *, crowd: str, unlabelled: str, kind: str = "panoptic", progress: Any
) -> dict[str, Any]:
    """Index all tars of a folder, in the order of their names; `progress` wraps the list of paths."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError("there is no .tar in this folder", where=str(folder), remedy="Give the folder of the shards.")
    scans = [scan_shard(path, len(vocabulary)) for path in progress(paths)]
    return write_index(folder, vocabulary, scans, crowd=crowd, unlabelled=unlabelled, kind=kind)


def publish(partial: Path, final: Path) -> None:
    """Give a finished file its name, after its bytes have reached the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(final)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    publish(partial, path)


def file_checksum(path: Path) -> str:
    """sha256 of a local file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_double_keys(scans: list[ShardScan], folder: Path) -> None:
    problems = Problems()
    shard_of: dict[str, str] = {}
    for scan in scans:
        for row in scan.rows:
            if row["key"] in shard_of:
                problems.add("keys in two shards", f"{row['key']} in {shard_of[row['key']]} and {scan.shard.name}")
            shard_of[row["key"]] = scan.shard.name
    problems.refuse("the source cannot be indexed", where=str(folder), remedy="A key must be unique in a source.")
