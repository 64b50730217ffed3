"""Packed samples parted by chance into a training and a held-out source, with frequency bands of the training part."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mf_scale.data.index import COLUMNS, FORMAT, HEAD, SCHEMA, VERSION, Index, head_digest
from mf_scale.errors import UserError
from mf_scale.rundir import disk_errors, file_digest
from mf_scale.vocabulary import BANDS, Vocabulary

_END_OF_TAR = bytes(1024)
_ALIKE = ("vocabulary", "kind", "crowd", "unlabelled", "labels")
"""What all sources must say alike, since one index says it of all their samples."""


@dataclass(frozen=True)
class Bands:
    """Images of training up to which a class is rare, and common; a class without any has no band."""

    rare: int
    common: int

    def of(self, images: int) -> str | None:
        """The band of a class that so many images of training hold."""
        return BANDS[(images > self.rare) + (images > self.common)] if images else None


def open_pool(sources: Sequence[str]) -> list[Index]:
    """The sources, opened; UserError where they do not say the same of their samples, or share some."""
    pool = [Index.open(source) for source in sources]
    for index in pool[1:]:
        unlike = [name for name in _ALIKE if _said(index, name) != _said(pool[0], name)]
        if unlike:
            raise UserError(
                f"the sources differ in {', '.join(unlike)}",
                where=f"{pool[0].source}, {index.source}",
                remedy="Pack them alike: the same format, vocabulary and options.",
            )
    keys = [key for index in pool for key in index.table.column("key").to_pylist()]
    if len(set(keys)) < len(keys):
        double = next(key for key in keys if keys.count(key) > 1)
        raise UserError(
            f"{len(keys) - len(set(keys))} samples are in the sources twice, {double} for one",
            where=", ".join(sources),
            remedy="A sample that is trained on cannot be held out: leave one of them out.",
        )
    return pool


def _said(index: Index, name: str) -> Any:
    value = getattr(index, name)
    return value.to_dict() if hasattr(value, "to_dict") else value


def part_samples(samples: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `samples` are trained on and which are held out, int64, ascending: a function of the seed."""
    order = np.random.Generator(np.random.PCG64([seed, samples])).permutation(samples)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def make_split(pool: Sequence[Index], folder: Path, *, seed: int, held_out: int, bands: Bands) -> None:
    """FOLDER/train and FOLDER/val of the pool, if they are not there: whole or not at all. Raises UserError."""
    if folder.is_dir():
        return
    chosen = part_samples(sum(index.samples for index in pool), held_out, seed)
    rows = [(index, i) for index in pool for i in range(index.samples)]
    train = [rows[i] for i in chosen[0]]
    counts = np.zeros(len(pool[0].packed), np.int64)
    for index, i in train:
        counts[index.sample(i).class_ids] += 1
    vocabulary = _banded(pool[0].packed, counts, bands)
    making = folder.with_name(f".{folder.name}")
    with disk_errors(folder):
        shutil.rmtree(making, ignore_errors=True)
        for name, part in (("train", train), ("val", [rows[i] for i in chosen[1]])):
            (making / name).mkdir(parents=True)
            _write_source(making / name, name, part, vocabulary)
        making.rename(folder)


def _banded(vocabulary: Vocabulary, counts: np.ndarray, bands: Bands) -> Vocabulary:
    classes = zip(vocabulary.classes, counts.tolist(), strict=True)
    return replace(vocabulary, classes=tuple(replace(c, frequency=bands.of(images)) for c, images in classes))


def _write_source(folder: Path, name: str, samples: Sequence[tuple[Index, int]], vocabulary: Vocabulary) -> None:
    """One tar of the samples' own bytes, and its index."""
    shard, rows = folder / f"{name}-000000.tar", []
    with shard.open("wb") as tar:
        for index, i in samples:
            row = index.sample(i)
            rows.append({**vars(row), "shard": 0, "offset": tar.tell()})
            tar.write(index.storage.read(row.shard, row.offset, row.size))
        tar.write(_END_OF_TAR)
    columns = folder / COLUMNS
    with pa.OSFile(str(columns), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA).combine_chunks())
    size, first = shard.stat().st_size, samples[0][0]
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "samples": len(rows),
        **{key: _said(first, key) for key in _ALIKE},
        "vocabulary": vocabulary.to_dict(),
        "columns": {"name": COLUMNS, "size": columns.stat().st_size, "sha256": file_digest(columns)},
        "shards": [{"name": shard.name, "size": size, "sha256": file_digest(shard), "samples": len(rows)}],
    }
    (folder / HEAD).write_text(json.dumps({**head, "digest": head_digest(head)}), encoding="utf-8")


def pool_digest(pool: Sequence[Index]) -> str:
    """sha256 over the sources' digests, in order."""
    return hashlib.sha256("".join(index.digest for index in pool).encode()).hexdigest()
