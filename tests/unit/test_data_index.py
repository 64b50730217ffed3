"""The index: what it holds, and what it refuses."""

from __future__ import annotations

import json
import pickle
import tarfile

import numpy as np
import pytest

from data_tools.index import index_source, scan_shard
from mf_scale.data.index import HEAD, Index, head_digest, verify_shards
from mf_scale.data.samples import parse_sample
from mf_scale.errors import UserError
from tests.sources import VOCABULARY, changed_bytes, make_source, sample_members, write_shard


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), [5, 3])


def test_rows_point_at_their_samples(index):
    assert index.samples == 8 and [s.samples for s in index.shards] == [5, 3]
    for i in range(index.samples):
        record = index.sample(i)
        raw = parse_sample(index.storage.read(record.shard, record.offset, record.size), record.key)
        assert raw.key == f"s{i:03d}" and raw.meta["origin"]["number"] == i
        assert (raw.meta["height"], raw.meta["width"]) == (record.height, record.width)
        assert record.class_ids == sorted({s["label"] for s in raw.meta["segments"]})
    assert record.offset + record.size <= index.shards[1].size
    counts = [sum(k in index.sample(i).class_ids for i in range(8)) for k in range(6)]
    assert index.class_counts().tolist() == counts


def test_columns_are_views_and_the_index_pickles_small(index):
    assert not index.column("offset").flags.owndata and index.column("offset").dtype == np.int64
    data = pickle.dumps(index)
    assert len(data) < 500
    again = pickle.loads(data)  # noqa: S301 - our own object
    assert again.digest == index.digest and again.sample(7) == index.sample(7)


def test_an_index_is_reproducible(index, tmp_path):
    assert make_source(tmp_path, [5, 3]).digest == index.digest
    assert make_source(tmp_path / "other", [4, 4]).digest != index.digest


def test_changed_and_missing_shards_are_named(tmp_path):
    index = make_source(tmp_path, [2, 2, 2])
    verify_shards(index, checksums=True)
    with changed_bytes(tmp_path / "part-001.tar", 600, b"xx"):
        verify_shards(index, checksums=False)
        with pytest.raises(UserError, match=r"part-001\.tar has another checksum"):
            verify_shards(index, checksums=True)
    (tmp_path / "part-000.tar").unlink()
    with (tmp_path / "part-002.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"2 of 3 shards.*part-000\.tar is missing.*part-002\.tar has \d+ bytes"):
        verify_shards(index, checksums=False)


def test_a_missing_or_tampered_index_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no index of shards"):
        Index.open(tmp_path)
    make_source(tmp_path, [2])
    head = json.loads((tmp_path / HEAD).read_text())
    for change, said in (
        ({"samples": 9, "crowd": "ignore"}, "changed by hand"),
        ({"version": 7}, "not an index of version 1"),
        ({"format": None}, "not an index of version 1"),
    ):
        (tmp_path / HEAD).write_text(json.dumps({**head, **change}))
        with pytest.raises(UserError, match=said):
            Index.open(tmp_path)
    evil = {**head, "columns": {**head["columns"], "name": "../samples.arrow"}}
    (tmp_path / HEAD).write_text(json.dumps({**evil, "digest": head_digest(evil)}))
    with pytest.raises(UserError, match="not a plain file name"):
        Index.open(tmp_path)
    (tmp_path / HEAD).write_text("{")
    with pytest.raises(UserError, match="malformed"):
        Index.open(tmp_path)


def split_members(number: int, key: str) -> tuple[dict, dict]:
    members = sample_members(number, key)
    image = {"__key__": key, "jpg": members.pop("jpg")}
    return image, members


def test_shards_with_broken_samples_are_refused_with_all_findings(tmp_path):
    image, rest = split_members(0, "a")
    alone = {"__key__": "c", "jpg": image["jpg"]}
    meta = json.loads(sample_members(1, "d")["json"])
    meta["segments"][0]["label"] = 6
    outside = {**sample_members(1, "d"), "json": json.dumps(meta).encode()}
    write_shard(tmp_path / "x.tar", [image, sample_members(1, "b"), rest, alone, outside])
    with pytest.raises(UserError) as raised:
        scan_shard(tmp_path / "x.tar", len(VOCABULARY))
    said = str(raised.value)
    assert "keys whose members stand apart: 1 (a)" in said
    assert "c: it needs one image and one json" in said and "label 6 is outside the vocabulary of 6 classes" in said


def test_double_members_truncated_tars_and_double_keys_are_refused(tmp_path):
    image, _ = split_members(0, "a")
    write_shard(tmp_path / "double.tar", [sample_members(0, "a"), image])
    with pytest.raises(UserError, match=r"a\.jpg stands twice"):
        scan_shard(tmp_path / "double.tar", 6)
    write_shard(tmp_path / "whole.tar", [sample_members(i, f"k{i}") for i in range(3)])
    data = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        middle = tar.getmember("k1.jpg").offset_data + 100
    (tmp_path / "short.tar").write_bytes(data[:middle])
    with pytest.raises(UserError, match="cannot be indexed"):
        scan_shard(tmp_path / "short.tar", 6)
    (tmp_path / "folder").mkdir()
    for name in ("1.tar", "2.tar"):
        write_shard(tmp_path / "folder" / name, [sample_members(0, "same")])
    with pytest.raises(UserError, match=r"keys in two shards: 1 \(same in 1\.tar and 2\.tar\)"):
        index_source(tmp_path / "folder", VOCABULARY, crowd="none", unlabelled="none", progress=iter)
