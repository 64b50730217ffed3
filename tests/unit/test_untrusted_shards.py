"""Shards and indexes that somebody else made: what is wrong in them is named, costs no memory, and touches nothing."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tqdm import tqdm

from data_tools.index import Meaning, index_source
from mf_scale.data.decode import decode_sample
from mf_scale.data.index import COLUMNS, HEAD, SCHEMA, Index, head_digest
from mf_scale.data.reader import SampleReader
from mf_scale.data.samples import BadSample, parse_sample
from mf_scale.errors import UserError
from tests.sources import VOCABULARY, make_source, sample_members

BLOCK = tarfile.BLOCKSIZE
GIB = 1 << 30
MODEST = 48 << 20
"""Bytes of memory that refusing a few kilobytes may take."""
SAMPLE = {name: bytes(data) for name, data in sample_members(0, "a").items() if name != "__key__"}  # type: ignore[arg-type]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % BLOCK)


def sample(key: str = "a", **changed: bytes | None) -> bytes:
    """The members of a sound sample in a row; those named (dots as underscores) otherwise or left out."""
    members = SAMPLE | {name.replace("_", "."): data for name, data in changed.items()}
    return b"".join(member(f"{key}.{name}", data) for name, data in members.items() if data is not None)


def with_field(head: bytes, field: slice, value: bytes, *, sound: bool = True) -> bytes:
    """A header with a field overwritten, its checksum made right again if `sound`."""
    changed = bytearray(head)
    changed[field] = value
    if sound:
        changed[148:156] = b" " * 8
        changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def sparse(size: int) -> bytes:
    """GNU's sparse member: two kilobytes that stand for `size` zeros."""
    fields = b"%011o\0" % size
    head = with_field(header("a.jpg", 0, tarfile.GNUTYPE_SPARSE), slice(386, 410), fields + b"%011o\0" % 0)
    return with_field(head, slice(483, 495), fields)


def pax(**records: str) -> bytes:
    """A PAX header for the member behind it."""
    lines = b""
    for name, value in records.items():
        line = f" GNU.sparse.{name}={value}\n".encode()
        length = len(line) + len(str(len(line) + 2))
        lines += str(length).encode() + line
    return header("././@PaxHeader", len(lines), tarfile.XHDTYPE) + lines + bytes(-len(lines) % BLOCK)


WHOLE, CUT = sample(), member("a.jpg", SAMPLE["jpg"])
META = json.loads(SAMPLE["json"])
SPARSE_PAX = pax(major="0", minor="1", name="a.jpg", size=str(GIB), map=f"{GIB},0") + header("a.jpg", 0)


def meta(**changed: Any) -> bytes:
    return sample(json=json.dumps({**META, **changed}).encode())


def segment(**changed: Any) -> bytes:
    return meta(segments=[{**META["segments"][0], **changed}, *META["segments"][1:]])


BAD = {
    "absolute name": member("/etc/a.jpg", b"x") + WHOLE,
    "name that climbs": member("../a.jpg", b"x") + WHOLE,
    "name that climbs later": member("b/../../a.jpg", b"x") + WHOLE,
    "backslashes": member("..\\a.jpg", b"x") + WHOLE,
    "symbolic link": header("a.jpg", 0, tarfile.SYMTYPE, "/etc/passwd") + sample(jpg=None),
    "hard link": header("a.jpg", 0, tarfile.LNKTYPE, "a.json") + sample(jpg=None),
    "character device": header("a.jpg", 0, tarfile.CHRTYPE) + sample(jpg=None),
    "pipe": header("a.jpg", 0, tarfile.FIFOTYPE) + sample(jpg=None),
    "huge member": header("a.jpg", 7 * GIB) + b"x" * BLOCK,
    "member of 2^62 bytes": with_field(header("a.jpg", 0), slice(124, 136), b"\x80" + (1 << 62).to_bytes(11)) + WHOLE,
    "negative size": with_field(header("a.jpg", 0), slice(124, 136), b"\xff" + (-BLOCK).to_bytes(11, signed=True))
    + WHOLE,
    "long name of 2^33 bytes": header("././@LongLink", 8 * GIB - 1, tarfile.GNUTYPE_LONGNAME) + WHOLE,
    "sparse member": sparse(GIB) + sample(jpg=None),
    "sparse member in PAX": SPARSE_PAX + sample(jpg=None),
    "compressed zeros": gzip.compress(header("a.jpg", GIB // 8) + bytes(GIB // 8) + sample(jpg=None)),
    "member twice": CUT + WHOLE,
    "key whose members stand apart": CUT + member("b.jpg", b"x") + sample(jpg=None),
    "cut in a member": WHOLE[: len(CUT) - 700],
    "cut in a header": CUT + WHOLE[len(CUT) : len(CUT) + 100],
    "wrong checksum": with_field(CUT[:BLOCK], slice(0, 1), b"b", sound=False) + WHOLE[BLOCK:],
    "wrong checksum later": CUT + with_field(WHOLE[len(CUT) :][:BLOCK], slice(0, 1), b"b", sound=False),
    "no member": bytes(2 * BLOCK),
    "empty json": sample(json=b""),
    "deep json": sample(json=b"[" * 100_000),
    "json of a list": sample(json=b"[]"),
    "number of 10,000 digits": sample(json=b'{"height": ' + b"9" * 10_000 + b"}"),
    "infinite height": meta(height=1e999),
    "height of 2^100": meta(height=2**100),
    "no segments": meta(segments=None),
    "label outside": segment(label=6),
    "negative label": segment(label=-1),
    "label of 2^100": segment(label=2**100),
}
"""Tars that neither the index nor a reader takes."""
BAD_WHEN_DECODED = {
    "image of no bytes": sample(jpg=b""),
    "image that is a script": sample(jpg=b"#!/bin/sh\ntouch pwned\n"),
    "layer that is not there": segment(layer=1),
    "map of no bytes": sample(seg_png=b""),
    "map that is the image": sample(seg_png=SAMPLE["jpg"]),
    "segment that is not listed": meta(segments=META["segments"][:2]),
}
"""Tars whose fault shows in the bytes of image and map, which an index of our own layout does not need."""


def peak(act: Callable[[], object]) -> int:
    """Bytes of Python's memory that `act` takes at its worst."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read(data: bytes) -> None:
    with pytest.raises(BadSample):
        decode_sample(parse_sample(data, "a"), len(VOCABULARY), 1 << 20)


@pytest.mark.parametrize("data", (BAD | BAD_WHEN_DECODED).values(), ids=BAD | BAD_WHEN_DECODED)
def test_no_reader_takes_a_bad_sample_nor_much_memory(data):
    assert peak(lambda: read(data)) < MODEST


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_no_index_is_made_of_a_bad_shard(data, tmp_path):
    folder = tmp_path / "in" / "source"
    folder.mkdir(parents=True)
    (folder / "x.tar").write_bytes(data + bytes(2 * BLOCK))

    def make() -> None:
        with pytest.raises(UserError, match=r"x\.tar") as caught:
            index_source(folder, VOCABULARY, Meaning("none", "none"), progress=partial(tqdm, disable=True))
        assert caught.value.exit_code == 2 and len(str(caught.value)) < 2000

    assert peak(make) < MODEST
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["in", "in/source", "in/source/x.tar"]


class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def test_nothing_in_a_shard_is_unpickled(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "went off"))
    folder = tmp_path / "source"
    folder.mkdir()
    others = "".join(["pickle pkl pyd pth pt npy npz cls ten tb mp json.gz"]).split()
    data = WHOLE + b"".join(member(f"a.{suffix}", bomb) for suffix in others)
    (folder / "x.tar").write_bytes(data + bytes(2 * BLOCK))
    index_source(folder, VOCABULARY, Meaning("none", "none"), progress=partial(tqdm, disable=True))
    index = Index.open(folder)
    stored = SampleReader(index, block_samples=1, budget=0, max_pixels=1 << 20).load_exact(0)
    assert stored.image.shape == (40, 56, 3) and not (tmp_path / "went off").exists()
    pickle.loads(bomb)  # noqa: S301 - our own: it would have
    assert (tmp_path / "went off").exists()


def rewritten(index: Index, columns: dict[str, list[Any]], **head_changes: Any) -> None:
    """The source's index with other columns and another head, as somebody would write it who knows the format."""
    folder = Path(index.source)
    found = {name: columns.get(name, index.table.column(name).to_pylist()) for name in SCHEMA.names}
    table = pa.table({name: pa.array(found[name], SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA)
    with pa.OSFile(str(folder / "new"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)
    (folder / "new").replace(folder / COLUMNS)
    head = json.loads((folder / HEAD).read_text())
    head["columns"]["size"] = (folder / COLUMNS).stat().st_size
    head |= head_changes
    (folder / HEAD).write_text(json.dumps({**head, "digest": head_digest(head)}))


LIES = {
    "an offset behind the shard": ("offset", [1 << 40, None, None]),
    "a negative offset": ("offset", [-512, None, None]),
    "a size of 2^60": ("size", [None, 1 << 60, None]),
    "no size": ("size", [None, 0, None]),
    "samples that overlap": ("offset", [None, 0, None]),
    "a shard that is not there": ("shard", [None, None, 7]),
    "a negative shard": ("shard", [-1, None, None]),
    "samples in another order": ("shard", [1, 0, 0]),
    "a class outside the vocabulary": ("class_ids", [[0, 6], None, None]),
    "a negative class": ("class_ids", [[-1], None, None]),
    "a row without a value": ("height", [..., None, None]),
}


@pytest.mark.parametrize(("name", "lie"), LIES.values(), ids=LIES)
def test_an_index_that_lies_is_not_opened(name, lie, tmp_path):
    index = make_source(tmp_path, [2, 1])
    true = index.table.column(name).to_pylist()
    column = [None if new is ... else old if new is None else new for old, new in zip(true, lie, strict=True)]
    rewritten(index, {name: true})
    Index.open(tmp_path)
    rewritten(index, {name: column})
    with pytest.raises(UserError, match="the index is malformed") as caught:
        Index.open(tmp_path)
    assert caught.value.exit_code == 2


def test_columns_whose_lists_point_elsewhere_are_not_read(tmp_path):
    index = make_source(tmp_path, [2, 1])
    offsets = np.array([0, 2, 1 << 40, 3], np.int64)
    values = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    lists = pa.Array.from_buffers(
        SCHEMA.field("class_ids").type,
        3,
        [None, pa.py_buffer(offsets)],
        children=[pa.Array.from_buffers(pa.int32(), 3, [None, values])],
    )
    true = {name: index.table.column(name).combine_chunks() for name in SCHEMA.names}
    table = pa.table([lists if name == "class_ids" else true[name] for name in SCHEMA.names], schema=SCHEMA)
    with pa.OSFile(str(tmp_path / "new"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)
    (tmp_path / "new").replace(tmp_path / COLUMNS)
    head = json.loads((tmp_path / HEAD).read_text())
    head["columns"]["size"] = (tmp_path / COLUMNS).stat().st_size
    (tmp_path / HEAD).write_text(json.dumps({**head, "digest": head_digest(head)}))
    with pytest.raises(UserError, match="the index is malformed"):
        Index.open(tmp_path)
