"""LVIS v1 and v0.5: a long-tailed list in its layout, with the fields that say which classes were looked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_tools.formats import lvis
from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary
from tests.unit.packed_formats import SAMPLE, VOCABULARIES, pack, read_metas, read_samples

pytest.importorskip("pycocotools.mask", reason="polygons are drawn with pycocotools")
FILES = {"v1": lvis.VOCABULARY_V1, "v0.5": lvis.VOCABULARY_V05}


def make_tree(folder: Path, version: str, place: str = "annotations") -> Path:
    """The embedded instances as LVIS writes them: every id its own category, images in both of COCO's folders."""
    vocabulary = Vocabulary.load(VOCABULARIES / FILES[version])
    data = json.loads((SAMPLE / "coco_stuff" / "annotations" / "instances_val.json").read_text())
    for number, image in enumerate(data["images"]):
        where = ("train2017", "val2017")[number % 2]
        (folder / where).mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLE / "coco_stuff" / "val" / image["file_name"], folder / where)
        image["coco_url"] = f"http://images.cocodataset.org/{where}/{image['file_name']}"
        image["file_name"] = f"COCO_val2014_{image['file_name']}"  # as in v0.5; v1 has none
        image["neg_category_ids"] = [1200 - number, 5, 300]
        image["not_exhaustive_category_ids"] = [7] if number % 3 == 0 else []
        if version == "v1":
            del image["file_name"]
    shapes = [a for a in data["annotations"] if isinstance(a["segmentation"], list)]
    for number, annotation in enumerate(shapes):
        annotation["category_id"] = 1 + number * 37 % 1200
        del annotation["iscrowd"]  # LVIS has no crowds
    data["annotations"] = shapes
    data["categories"] = [
        {"id": c.source_id, "name": c.name, "frequency": (c.frequency or "")[:1], "synset": f"{c.name}.n.01"}
        for c in vocabulary.classes
    ]
    (folder / place).mkdir(exist_ok=True)
    (folder / place / f"lvis_{version}_val.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(("version", "place"), [("v1", "annotations"), ("v0.5", ".")])
def test_instances_and_federated_fields_are_packed(tmp_path, version, place):
    tree = make_tree(tmp_path / "src", version, place)
    data = json.loads((tree / place / f"lvis_{version}_val.json").read_text())
    assert pack(f"lvis_{version}", tree, tmp_path / "out", "val") == 0
    index = Index.open(tmp_path / "out")
    label_of = index.vocabulary.index_of_source_id()
    assert index.kind == "instance" and len(index.vocabulary) == {"v1": 1203, "v0.5": 1230}[version]
    samples, metas = read_samples(tmp_path / "out"), read_metas(tmp_path / "out")
    assert len(samples) == len(data["images"]) == 12
    for image in data["images"]:
        key = image["coco_url"].split("/")[-1].removesuffix(".jpg")
        negative = sorted(label_of[number] for number in image["neg_category_ids"])
        rest = [label_of[number] for number in image["not_exhaustive_category_ids"]]
        assert metas[key]["federated"] == {"negative": negative, "not_exhaustive": rest}
        listed = {a["id"]: label_of[a["category_id"]] for a in data["annotations"] if a["image_id"] == image["id"]}
        assert {s["source_id"]: s["label"] for s in metas[key]["segments"]} == listed
        assert len(samples[key].labels) == len(listed)


def test_processes_pack_the_same_bytes(tmp_path):
    tree = make_tree(tmp_path / "src", "v1")
    for workers in ("1", "2"):
        assert pack("lvis_v1", tree, tmp_path / workers, "val", "--shard-size", "5", "--workers", workers) == 0
    assert Index.open(tmp_path / "1").digest == Index.open(tmp_path / "2").digest
    assert len(Index.open(tmp_path / "1").shards) == 3


def test_the_list_of_another_version_is_refused(tmp_path):
    tree = make_tree(tmp_path, "v0.5")
    (tree / "annotations" / "lvis_v0.5_val.json").rename(tree / "annotations" / "lvis_v1_val.json")
    with pytest.raises(UserError) as error:
        lvis.open_v1(tree, "val", Vocabulary.load(VOCABULARIES / lvis.VOCABULARY_V1))
    assert "categories whose id is another class in vocabulary lvis_v1_1203: 1" in str(error.value)
    assert "1 is acorn, not aerosol_can" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("neg_category_ids", [5, 9999], "federated categories are not in vocabulary lvis_v1_1203: 1"),
        ("coco_url", "http://images.cocodataset.org/../etc/passwd", "missing images in"),
        ("coco_url", "http://images.cocodataset.org/annotations/lvis_v1_val.jpg", "missing images in"),
        ("not_exhaustive_category_ids", None, "not LVIS: TypeError"),
    ],
)
def test_entries_that_do_not_fit_are_refused(tmp_path, field, value, told):
    path = make_tree(tmp_path, "v1") / "annotations" / "lvis_v1_val.json"
    data = json.loads(path.read_text())
    data["images"][0][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        lvis.open_v1(tmp_path, "val", Vocabulary.load(VOCABULARIES / lvis.VOCABULARY_V1))
    assert told in str(error.value)


def test_a_list_that_is_not_there_is_named(tmp_path, capsys):
    assert pack("lvis_v1", make_tree(tmp_path, "v1"), tmp_path / "out", "train") == 2
    assert "lvis_v1_train.json" in capsys.readouterr().err
