"""COCO instances, and the lists that COCO's relatives share: packed from real annotations, and broken ones refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools.formats import coco_instances, coco_panoptic, coco_stuff
from data_tools.formats.coco_lists import EMPTY, NO_PIXEL
from data_tools.record import BadRecord
from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary
from tests.unit.packed_formats import SAMPLE, VOCABULARIES, mask_of, pack, read_metas, read_samples

rle = pytest.importorskip("pycocotools.mask", reason="polygons are drawn with pycocotools")
SOURCE = SAMPLE / "coco_stuff"
THINGS = Vocabulary.load(VOCABULARIES / coco_instances.VOCABULARY)
LISTING = Path("annotations/instances_val.json")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the embedded instances, to be broken."""
    shutil.copytree(SOURCE / "val", tmp_path / "src" / "val")
    (tmp_path / "src" / "annotations").mkdir()
    shutil.copy(SOURCE / LISTING, tmp_path / "src" / LISTING)
    return tmp_path / "src"


def change(tree: Path, act) -> None:
    data = json.loads((tree / LISTING).read_text())
    act(data)
    (tree / LISTING).write_text(json.dumps(data))


def test_every_instance_keeps_its_pixels_and_an_image_without_any_is_a_sample(tmp_path):
    assert pack("coco_instances", SOURCE, tmp_path / "out", "train") == 0
    index = Index.open(tmp_path / "out")
    assert index.kind == "instance" and index.samples == 37 and all(index.vocabulary.things)
    data = json.loads((SOURCE / "annotations" / "instances_train.json").read_text())
    label_of = index.vocabulary.index_of_source_id()
    samples, metas = read_samples(tmp_path / "out"), read_metas(tmp_path / "out")
    bare = layered = 0
    for image in data["images"]:
        key = Path(image["file_name"]).stem
        listed = {a["id"]: a for a in data["annotations"] if a["image_id"] == image["id"]}
        assert {s["source_id"] for s in metas[key]["segments"]} == listed.keys()
        assert metas[key]["origin"]["id"] == image["id"]
        for number, segment in enumerate(metas[key]["segments"]):
            annotation = listed[segment["source_id"]]
            shape, size = annotation["segmentation"], (image["height"], image["width"])
            packed = rle.merge(rle.frPyObjects(shape, *size)) if isinstance(shape, list) else shape
            assert rle.area(packed) == mask_of(samples[key], number).sum()
            mask = np.asfortranarray(mask_of(samples[key], number).astype(np.uint8))
            assert rle.iou([rle.encode(mask)], [packed], [0])[0, 0] == 1.0
            assert segment["label"] == label_of[annotation["category_id"]]
            assert segment["crowd"] == bool(annotation["iscrowd"])
        layered += len(samples[key].stored_map) > 1
        bare += not listed
    assert layered and bare == coco_instances.open_source(SOURCE, "train", THINGS).notes[EMPTY] > 0


def test_crowds_packed_as_lists_of_runs_are_read(tree):
    def crowd(data):
        annotation = data["annotations"][0]
        image = next(i for i in data["images"] if i["id"] == annotation["image_id"])
        size = [image["height"], image["width"]]
        annotation |= {"iscrowd": 1, "segmentation": {"size": size, "counts": [10, 20, size[0] * size[1] - 30]}}

    change(tree, crowd)
    first = json.loads((tree / LISTING).read_text())["annotations"][0]
    source = coco_instances.open_source(tree, "val", THINGS)
    record = next(r for r in source.records if r.origin["id"] == first["image_id"])
    annotation = source.annotate(record)
    number = next(i for i, s in enumerate(annotation.segments) if s.source_id == first["id"])
    assert annotation.segments[number].crowd and (annotation.segment_map == number).sum() == 20
    assert (annotation.segment_map == number).any(axis=0).T.reshape(-1)[10:30].all()  # runs go down the columns


def test_names_of_any_script_are_packed(tree):
    names = {path.name: f"Straße {i} 東.a.jpg" for i, path in enumerate(sorted((tree / "val").iterdir()))}
    for old, new in names.items():
        (tree / "val" / old).rename(tree / "val" / new)
    change(tree, lambda data: [entry.update(file_name=names[entry["file_name"]]) for entry in data["images"]])
    assert pack("coco_instances", tree, tree / "out", "val") == 0
    assert set(read_samples(tree / "out")) == {f"Straße_{i}_東_a" for i in range(len(names))}


def twice(data):
    data["annotations"].append(data["annotations"][0])


def two_entries(data):
    data["images"].append({**data["images"][0], "file_name": "other.jpg"})


def same_key(data):
    data["images"].append({**data["images"][0], "id": 1})


def orphan(data):
    data["annotations"][0]["image_id"] = 1


def gone(data):
    data["images"][0]["file_name"] = "gone.jpg"


def outside(data):
    data["images"][0]["file_name"] = "../annotations/instances_val.json"


def unknown(data):
    data["annotations"][0]["category_id"] = 12


def shifted(data):
    for category in data["categories"]:
        category["id"] += 1


def enormous(data):
    data["images"][0].update(height=1 << 20, width=1 << 20)


def no_images(data):
    del data["images"]


def no_number(data):
    data["annotations"][0]["category_id"] = None


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (twice, "annotation ids that stand twice: 1"),
        (two_entries, "image ids that stand twice: 1 (1 of 13)"),
        (same_key, "listed twice, or whose names give the same key: 1"),
        (orphan, "without an image entry: 1"),
        (gone, "missing images in"),
        (outside, "missing images in"),
        (unknown, "category 12, not in vocabulary coco_things_80: 1"),
        (shifted, "whose id is another class in vocabulary coco_things_80: "),
        (enormous, "empty or too large by their entry: 1"),
        (no_images, "not COCO instances: ValueError it has no list of images"),
        (no_number, "not COCO instances: TypeError"),
    ],
)
def test_lists_that_do_not_fit_are_refused_with_counts(tree, act, told):
    change(tree, act)
    with pytest.raises(UserError) as error:
        coco_instances.open_source(tree, "val", THINGS)
    assert told in str(error.value)


def test_missing_parts_and_broken_files_are_named(tree, capsys):
    assert pack("coco_instances", tree, tree / "out", "train") == 2
    assert "instances_train.json" in capsys.readouterr().err
    (tree / LISTING).write_text("{")
    assert pack("coco_instances", tree, tree / "out", "val") == 2
    assert "not COCO instances" in capsys.readouterr().err


def test_shapes_are_checked_against_the_image(tree, capsys):
    def resize(data):
        data["images"][0]["height"] += 1

    change(tree, resize)
    assert pack("coco_instances", tree, tree / "out", "val") == 2
    assert "have another size" in capsys.readouterr().err


def test_what_has_no_pixel_is_counted(tree):
    def empty(data):
        data["annotations"][0]["segmentation"] = []
        data["annotations"][1]["segmentation"].append([1.0, 2.0])

    change(tree, empty)
    source = coco_instances.open_source(tree, "val", THINGS)
    notes = [source.annotate(record).notes for record in source.records]
    assert sum(n.get(NO_PIXEL, 0) for n in notes) == 1
    assert sum(n.get("polygons of fewer than three points, left out", 0) for n in notes) == 1


def test_stuff_that_things_hide_is_counted(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src")
    path = tmp_path / "src" / "annotations" / "stuff_val.json"
    data = json.loads(path.read_text())
    things = json.loads((tmp_path / "src" / LISTING).read_text())["annotations"]
    thing = next(a for a in things if isinstance(a["segmentation"], list))
    number = max(a["id"] for a in data["annotations"]) + 1
    data["annotations"].append({**thing, "category_id": 182, "id": number})
    path.write_text(json.dumps(data))
    stuff = Vocabulary.load(VOCABULARIES / coco_stuff.VOCABULARY)
    source = coco_stuff.open_source(tmp_path / "src", "val", stuff)
    record = next(r for r in source.records if r.origin["id"] == thing["image_id"])
    annotation = source.annotate(record)
    assert annotation.notes == {coco_stuff.HIDDEN: 1}
    assert number not in {s.source_id for s in annotation.segments}


def panoptic_tree(tmp_path: Path) -> tuple[Path, Vocabulary]:
    shutil.copytree(SAMPLE / "coco_panoptic", tmp_path / "panoptic")
    return tmp_path / "panoptic", Vocabulary.load(VOCABULARIES / coco_panoptic.VOCABULARY)


def test_panoptic_lists_share_the_checks(tmp_path):
    tree, vocabulary = panoptic_tree(tmp_path)
    path = tree / "annotations" / "panoptic_val.json"
    sound = json.loads(path.read_text())
    for act, told in ((two_entries, "image ids that stand twice"), (shifted, "another class"), (enormous, "too large")):
        data = json.loads(json.dumps(sound))
        act(data)
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match=told):
            coco_panoptic.open_source(tree, "val", vocabulary)


def test_a_panoptic_map_of_another_size_is_refused(tmp_path):
    from PIL import Image

    tree, vocabulary = panoptic_tree(tmp_path)
    record = coco_panoptic.open_source(tree, "val", vocabulary).records[0]
    Image.new("RGB", (7, 5)).save(record.payload[0])
    with pytest.raises(BadRecord, match="whose size is not"):
        coco_panoptic.annotate(record)
    Image.new("L", (7, 5)).save(record.payload[0])
    with pytest.raises(BadRecord, match="mode L"):
        coco_panoptic.annotate(record)
