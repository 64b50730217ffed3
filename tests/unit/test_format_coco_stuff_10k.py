"""COCO-Stuff-10k: its tree of MATLAB files made from real annotations, and files that are not what they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from data_tools.formats import coco_stuff_10k
from data_tools.formats.shapes import draw
from data_tools.record import BadRecord
from mf_scale.data.decode import none_value
from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary
from tests.unit.packed_formats import SAMPLE, VOCABULARIES, pack, read_samples

pytest.importorskip("pycocotools.mask", reason="the maps are drawn from polygons")
SOURCE = SAMPLE / "coco_stuff"
NONE_STORED = none_value(np.dtype(np.uint8))
VOCABULARY = Vocabulary.load(VOCABULARIES / coco_stuff_10k.VOCABULARY)


def real_maps() -> dict[str, np.ndarray]:
    """Class ids of every image of the embedded sample's val, things over stuff, uint8 [H,W], by file name."""
    lists = [json.loads((SOURCE / "annotations" / f"{kind}_val.json").read_text()) for kind in ("stuff", "instances")]
    maps = {i["id"]: np.zeros((i["height"], i["width"]), np.uint8) for i in lists[0]["images"]}
    for data in lists:
        for a in data["annotations"]:
            if a["category_id"] != 183:
                maps[a["image_id"]][draw(a["segmentation"], maps[a["image_id"]].shape)] = a["category_id"]
    return {i["file_name"]: maps[i["id"]] for i in lists[0]["images"]}


def save_map(path: Path, values: np.ndarray) -> None:
    """A file with the release's variables."""
    texts = np.array([["one"], ["two"]], object)
    matrices = {"S": values, "regionMapStuff": values.astype(np.uint16), "regionLabelsStuff": np.arange(5.0)}
    savemat(path, {**matrices, "names": texts, "captions": texts}, do_compression=True)


@pytest.fixture
def tree(tmp_path) -> Path:
    for folder in ("images", "annotations", "imageLists"):
        (tmp_path / "src" / folder).mkdir(parents=True)
    names = []
    for file, values in real_maps().items():
        names.append(f"COCO_train2014_{Path(file).stem}")
        shutil.copy(SOURCE / "val" / file, tmp_path / "src" / "images" / f"{names[-1]}.jpg")
        save_map(tmp_path / "src" / "annotations" / f"{names[-1]}.mat", values)
    (tmp_path / "src" / "imageLists" / "test.txt").write_text("\r\n".join(names) + "\r\n\r\n")
    return tmp_path / "src"


def first(tree: Path):
    return coco_stuff_10k.open_source(tree, "test", VOCABULARY).records[0]


def test_a_class_is_a_segment_and_0_is_unlabelled(tree, tmp_path):
    assert pack("coco_stuff_10k", tree, tmp_path / "out", "test") == 0
    index = Index.open(tmp_path / "out")
    assert index.kind == "semantic" and len(index.vocabulary) == 171
    samples = read_samples(tmp_path / "out")
    assert len(samples) == 12
    unlabelled = 0
    for file, values in real_maps().items():
        sample = samples[f"COCO_train2014_{Path(file).stem}"]
        ids = np.array([c.source_id for c in VOCABULARY.classes])[sample.labels]
        assert sorted(ids) == sorted(set(np.unique(values)) - {0})
        packed = np.append(ids, [0] * (256 - len(ids)))[sample.stored_map[0]]  # behind the segments: none
        assert (packed == values).all()
        assert (sample.stored_map[0][values == 0] == NONE_STORED).all()  # --unlabelled says what becomes of it
        unlabelled += int((values == 0).sum())
    assert unlabelled


def test_release_1_0_is_refused(tree, tmp_path, capsys):
    dense = {c.source_id: 2 + label for label, c in enumerate(VOCABULARY.classes)} | {0: 1}
    for path in (tree / "annotations").iterdir():
        values = coco_stuff_10k.read_matrix(path, "S")
        save_map(path, np.vectorize(dense.get)(values).astype(np.uint8))
    assert pack("coco_stuff_10k", tree, tmp_path / "out", "test") == 2
    assert not (tmp_path / "out" / "index.json").exists()
    said = capsys.readouterr().err
    assert "neither ids of vocabulary coco_stuff_171 nor declared" in said
    assert "29 (154 pixels" in said


@pytest.mark.parametrize(
    "content",
    [
        {"T": np.zeros((4, 4))},
        {"S": {"field": 1.0}},
        {"S": np.array([["a"], ["b"]], object)},
        {"S": "text"},
        {"S": np.zeros((3, 4, 5))},
        {"S": np.full((4, 4), 0.5)},
        {"S": np.full((4, 4), -1.0)},
        {"S": np.array([[1, 1 << 16]], np.int32)},
        {"S": np.array([[1, 2**31 - 1]], np.int32)},  # a table as long would take 8 GiB
    ],
)
def test_files_without_a_matrix_of_ids_are_refused(tree, content):
    record = first(tree)
    savemat(record.payload, content)
    with pytest.raises(BadRecord):
        coco_stuff_10k.stored_map(record)


def test_broken_files_are_refused(tree):
    record = first(tree)
    whole = record.payload.read_bytes()
    for data in (b"", b"\x89HDF\r\n" + bytes(600), whole[:150], whole[:300], b"not a file of MATLAB" * 30):
        record.payload.write_bytes(data)
        with pytest.raises(BadRecord):
            coco_stuff_10k.stored_map(record)


def test_a_map_of_another_size_is_refused(tree, tmp_path, capsys):
    record = first(tree)
    save_map(record.payload, coco_stuff_10k.stored_map(record)[:-1])
    assert pack("coco_stuff_10k", tree, tmp_path / "out", "test") == 2
    assert "another size" in capsys.readouterr().err


def test_lists_that_do_not_fit_are_refused_with_counts(tree):
    names = (tree / "imageLists" / "test.txt").read_text().split()
    (tree / "annotations" / f"{names[0]}.mat").unlink()
    (tree / "images" / f"{names[1]}.jpg").unlink()
    text = "\n".join([*names, names[2], "../images/x"])
    (tree / "imageLists" / "test.txt").write_text(text)
    with pytest.raises(UserError) as error:
        coco_stuff_10k.open_source(tree, "test", VOCABULARY)
    for told in ("the same key: 1", "missing images: 2", "missing maps: 2"):
        assert told in str(error.value)
    with pytest.raises(UserError, match="a part of the source is missing"):
        coco_stuff_10k.open_source(tree, "train", VOCABULARY)
    (tree / "imageLists" / "test.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no text"):
        coco_stuff_10k.open_source(tree, "test", VOCABULARY)
