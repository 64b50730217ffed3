"""Samples made elsewhere: an image and one PNG of label values, what they mean declared in the index."""

from __future__ import annotations

import io
import json
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mf_scale.data.decode import LABEL_VALUES, decode_sample
from mf_scale.data.ids import IdMeaning, LabelMember
from mf_scale.data.index import COLUMNS, FORMAT, HEAD, SCHEMA, VERSION, Index, head_digest
from mf_scale.data.reader import SampleReader
from mf_scale.data.samples import BadSample, RawSample, assemble, parse_sample
from mf_scale.data.targets import TargetRules, make_targets
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.sources import VOCABULARY, jpeg

IDS = IdMeaning(ignore=(255,), background=(0,), offset=0)
"""Over the vocabulary of the tests: its classes have the source ids 10 to 15."""
TABLE = IDS.table(VOCABULARY, LABEL_VALUES)


def labelled(values, *, number: int = 0, dtype=np.uint8) -> RawSample:
    pixels = np.array(values, dtype)
    png = cv2.imencode(".png", pixels)[1].tobytes()
    return RawSample("k", jpeg(number, *pixels.shape), [png], {})


def test_values_become_the_segments_of_the_classes_present():
    sample = decode_sample(labelled([[12, 12, 0, 15], [255, 10, 12, 0]]), 6, 1 << 20, TABLE)
    assert sample.labels.tolist() == [0, 2, 5] and sample.stored_map.dtype == np.uint8
    assert sample.stored_map.tolist() == [[[1, 1, 254, 2], [255, 0, 1, 254]]]
    assert sample.segment_layer.tolist() == [0, 0, 0] and not sample.crowd.any()
    made = make_targets(sample.stored_map, sample, TargetRules("semantic", np.ones(6, bool), "none", "none"))
    assert made.segment_map.tolist() == [[[1, 1, -1, 2], [-2, 0, 1, -1]]] and made.labels.tolist() == [0, 2, 5]


def test_an_image_may_hold_no_class_at_all():
    sample = decode_sample(labelled([[0, 255], [0, 0]]), 6, 1 << 20, TABLE)
    assert len(sample.labels) == 0 and sample.stored_map.tolist() == [[[254, 255], [254, 254]]]


def test_offset_and_sixteen_bits():
    many = Vocabulary("many", tuple(ClassInfo(f"class {i}", False, i + 1) for i in range(400)))
    table = IdMeaning(ignore=(65535,), offset=-999).table(many, LABEL_VALUES)
    values = np.arange(1000, 1400).reshape(20, 20)
    values[0, 0] = 65535
    sample = decode_sample(labelled(values, dtype=np.uint16), 400, 1 << 20, table)
    assert sample.labels.tolist() == list(range(1, 400)) and sample.stored_map.dtype == np.uint16
    assert sample.stored_map[0, 0, 0] == 65535 and sample.stored_map[0].reshape(-1)[1:].tolist() == list(range(399))


@pytest.mark.parametrize("values", [[[12, 77, 77, 0]], [[300, 10, 300, 0]]])
def test_a_value_without_meaning_is_named_with_its_pixels(values):
    raw = labelled(values, dtype=np.uint8 if np.max(values) < 256 else np.uint16)
    with pytest.raises(BadSample, match=rf"holds the value {np.max(values)} \(2 pixels\)"):
        decode_sample(raw, 6, 1 << 20, TABLE)


def test_sizes_must_agree_and_limits_hold():
    raw = labelled([[10, 10]])
    with pytest.raises(BadSample, match="segment map"):
        decode_sample(RawSample("k", jpeg(0, 3, 2), raw.maps, {}), 6, 1 << 20, TABLE)
    with pytest.raises(BadSample, match="above the limit of 1"):
        decode_sample(raw, 6, 1, TABLE)
    with pytest.raises(BadSample, match="mode RGB, not grey"):
        colours = io.BytesIO()
        Image.new("RGB", (2, 1)).save(colours, "PNG")
        decode_sample(RawSample("k", raw.image, [colours.getvalue()], {}), 6, 1 << 20, TABLE)


LABELS = LabelMember("Mask.PNG", IDS)


@pytest.mark.parametrize(
    "members", [{"jpg": b"i", "mask.png": b"m"}, {"png": b"i", "mask.png": b"m", "json": b"no json", "txt": b""}]
)
def test_image_and_label_are_taken_whatever_else_there_is(members):
    raw = assemble("k", members, LABELS)
    assert (raw.image, raw.maps, raw.meta) == (b"i", [b"m"], {})


def test_a_label_that_ends_like_an_image_is_not_taken_for_one():
    raw = assemble("k", {"jpg": b"i", "png": b"m"}, LabelMember("png", IDS))
    assert (raw.image, raw.maps) == (b"i", [b"m"])


@pytest.mark.parametrize("members", [{"jpg": b""}, {"mask.png": b""}, {"jpg": b"", "webp": b"", "mask.png": b""}])
def test_a_missing_part_is_named(members):
    with pytest.raises(BadSample, match=r"it needs one image and one mask.png, it has \["):
        assemble("k", members, LABELS)


def test_a_reader_reads_them_by_the_meaning_in_the_index(labelled_index):
    reader = SampleReader(labelled_index, block_samples=2, budget=1 << 20, max_pixels=1 << 20)
    good, events = reader.load(0, 0)
    assert good.key == "a" and good.labels.tolist() == [0, 2] and events == []
    replaced, events = reader.load(1, 0)
    assert replaced.key == "a" and "holds the value 99 (1 pixels)" in events[0]["reason"]
    assert reader.members(1).key == "b"


@pytest.fixture
def labelled_index(tmp_path):
    rows = []
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key, values in (("a", [[10, 12]]), ("b", [[10, 99]])):
            start, raw = tar.offset, labelled(values)
            for suffix, data in (("jpg", raw.image), ("png", raw.maps[0])):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            place = {"shard": 0, "key": key, "offset": start, "size": tar.offset - start}
            rows.append({**place, "height": 1, "width": 2, "class_ids": [0], "segments": 1})
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with pa.ipc.new_file(str(tmp_path / COLUMNS), SCHEMA) as writer:
        writer.write_table(table)
    shard = {"name": "x.tar", "size": (tmp_path / "x.tar").stat().st_size, "sha256": "", "samples": 2}
    head = {
        "format": FORMAT,
        "version": VERSION,
        "samples": 2,
        "crowd": "none",
        "unlabelled": "none",
        "kind": "semantic",
        "labels": LabelMember("png", IDS).to_dict(),
        "columns": {"name": COLUMNS, "size": (tmp_path / COLUMNS).stat().st_size, "sha256": ""},
        "shards": [shard],
        "vocabulary": VOCABULARY.to_dict(),
    }
    (tmp_path / HEAD).write_text(json.dumps({**head, "digest": head_digest(head)}))
    return Index.open(tmp_path)


def test_without_labels_the_same_members_are_no_sample():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("k.jpg", "k.png"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(BadSample, match="one image and one json"):
        parse_sample(stream.getvalue(), "k")
    assert parse_sample(stream.getvalue(), "k", LabelMember("png", IDS)).image == b""
