"""The index: what it holds, and what it refuses."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from mf_scale.data.index import HEAD, Index, head_digest, verify_shards
from mf_scale.data.samples import parse_sample
from mf_scale.errors import UserError
from tests.sources import changed_bytes, make_source


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
        ({"version": 7}, "not an index of version 2"),
        ({"format": None}, "not an index of version 2"),
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
