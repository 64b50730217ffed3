"""ADE20K-Full: the release's tree made from real panoptic maps; objects, stuff, parts, and what the 847 leave out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.formats import ade20k_full
from data_tools.record import BadRecord
from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary
from tests.unit.packed_formats import SAMPLE, VOCABULARIES, mask_of, pack, read_metas, read_samples

VOCABULARY = Vocabulary.load(VOCABULARIES / ade20k_full.VOCABULARY)
NAMES = {c.name.split(",")[0]: c.source_id for c in VOCABULARY.classes}
OUTSIDE = next(n for n in range(1, 3688) if n not in VOCABULARY.index_of_source_id())
IMAGES = 4
FOLDERS = ("urban/street", "home_or_hotel/bedroom")


def paint(objects: list[tuple[int, np.ndarray]], size: tuple[int, int]) -> tuple[np.ndarray, list[dict]]:
    """Colours of a map, uint8 [H,W,3], and the entries of its json."""
    colours = np.zeros((*size, 3), np.uint8)
    entries = []
    for number, (name, mask) in enumerate(objects, 1):
        colours[mask] = name // 256 * 10, name % 256, number * (250 // len(objects))
        entries.append({"id": number, "name_ndx": name, "parts": {"part_level": 0}})
    return colours, entries


def make_image(folder: Path, stem: str, image: Path, objects: list[tuple[int, np.ndarray]]) -> None:
    """NAME.jpg, NAME_seg.png, NAME_parts_1.png and NAME.json (latin-1, one part listed)."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, folder / f"{stem}.jpg")
    colours, entries = paint(objects, objects[0][1].shape)
    Image.fromarray(colours).save(folder / f"{stem}_seg.png")
    Image.fromarray(255 - colours).save(folder / f"{stem}_parts_1.png")
    entries.append({"id": 99, "name_ndx": NAMES["windowpane"], "parts": {"part_level": 1}})
    text = json.dumps({"annotation": {"raw_name": "Café", "object": entries}}, ensure_ascii=False)
    (folder / f"{stem}.json").write_text(text, encoding="latin-1")


def real_objects(annotation: dict) -> list[tuple[int, np.ndarray]]:
    """Things of a real image as cars and chairs, stuff as sky and walls."""
    with Image.open(SAMPLE / "coco_panoptic/annotations/panoptic_val" / annotation["file_name"]) as png:
        ids = np.asarray(png).astype(int) @ np.array([1, 256, 65536])
    thing = {s["id"]: s["category_id"] <= 90 for s in annotation["segments_info"]}
    names = (NAMES["sky"], NAMES["wall"]), (NAMES["car"], NAMES["chair"])
    return [(names[thing[number]][place % 2], ids == number) for place, number in enumerate(sorted(thing))]


@pytest.fixture
def tree(tmp_path) -> Path:
    listing = json.loads((SAMPLE / "coco_panoptic/annotations/panoptic_val.json").read_text())
    for number, annotation in enumerate(listing["annotations"][:IMAGES]):
        folder = tmp_path / "src/images/ADE/validation" / FOLDERS[number % 2]
        image = SAMPLE / "coco_panoptic/val" / f"{Path(annotation['file_name']).stem}.jpg"
        make_image(folder, f"ADE_val_{number:08}", image, real_objects(annotation))
    return tmp_path / "src"


def stem_of(tree: Path, number: int) -> str:
    return str(tree / "images/ADE/validation" / FOLDERS[number % 2] / f"ADE_val_{number:08}")


def annotate(tree: Path, number: int = 0):
    source = ade20k_full.open_source(tree, "val", VOCABULARY)
    return source.annotate(next(r for r in source.records if r.key == f"ADE_val_{number:08}"))


def test_the_vocabulary_numbers_by_name_ndx():
    assert len(VOCABULARY) == 847 and sum(not c.thing for c in VOCABULARY.classes) == 50
    assert NAMES["sky"] == 2420 and NAMES["car"] == 401 and NAMES["wall"] == 2978


def test_processes_pack_the_same_bytes(tree, tmp_path):
    for workers in ("1", "2"):
        assert pack("ade20k_full", tree, tmp_path / workers, "val", "--shard-size", "2", "--workers", workers) == 0
    assert Index.open(tmp_path / "1").digest == Index.open(tmp_path / "2").digest
    assert len(Index.open(tmp_path / "1").shards) == 2


@pytest.mark.parametrize("split", ["val", "validation"])
def test_objects_are_segments_and_those_of_stuff_are_one(tree, tmp_path, split):
    assert pack("ade20k_full", tree, tmp_path / "out", split) == 0
    index = Index.open(tmp_path / "out")
    assert index.kind == "panoptic" and index.samples == IMAGES
    samples, metas = read_samples(tmp_path / "out"), read_metas(tmp_path / "out")
    listing = json.loads((SAMPLE / "coco_panoptic/annotations/panoptic_val.json").read_text())
    for number, annotation in enumerate(listing["annotations"][:IMAGES]):
        key, objects = f"ADE_val_{number:08}", real_objects(annotation)
        joined = {n: np.logical_or.reduce([m for name, m in objects if name == n]) for n, _ in objects}
        want = [(n, m) for n, m in joined.items() if n in (NAMES["sky"], NAMES["wall"])]
        want += [(n, m) for n, m in objects if n in (NAMES["car"], NAMES["chair"])]
        sample = samples[key]
        assert len(sample.labels) == len(want)
        for name, mask in want:
            label = VOCABULARY.index_of_source_id()[name]
            assert any((mask_of(sample, i) == mask).all() for i in np.flatnonzero(sample.labels == label).tolist())
        assert metas[key]["origin"] == {"file": f"validation/{FOLDERS[number % 2]}/{key}.jpg"}


def test_objects_outside_the_vocabulary_are_unlabelled_and_counted(tree):
    size = np.asarray(Image.open(stem_of(tree, 0) + ".jpg")).shape[:2]
    bands = [np.arange(size[0])[:, None] // 20 + np.zeros(size, int) == i for i in range(3)]
    make_image(
        Path(stem_of(tree, 0)).parent,
        "ADE_val_00000000",
        Path(stem_of(tree, 2) + ".jpg"),
        [(OUTSIDE, bands[0]), (NAMES["car"], bands[1]), (OUTSIDE, bands[2])],
    )
    annotation = annotate(tree)
    assert annotation.notes == {ade20k_full.OUTSIDE: 2}
    assert (annotation.segment_map[0] == np.where(bands[1], 0, -1)).all()
    assert [VOCABULARY.names[s.label].split(",")[0] for s in annotation.segments] == ["car"]


def test_objects_that_only_the_map_or_the_json_tells_of_are_counted(tree):
    path = Path(stem_of(tree, 1) + ".json")
    data = json.loads(path.read_text(encoding="latin-1"))
    data["annotation"]["object"] += [{"name_ndx": NAMES["lamp"], "parts": {"part_level": 0}}] * 3
    path.write_text(json.dumps(data))
    assert annotate(tree, 1).notes == {ade20k_full.UNSEEN: 3}
    path = Path(stem_of(tree, 0) + "_seg.png")
    colours = np.asarray(Image.open(path)).copy()
    colours[0, 0] = 0, 77, 3
    Image.fromarray(colours).save(path)
    assert annotate(tree, 0).notes == {ade20k_full.UNLISTED: 1}


def test_maps_and_jsons_that_do_not_fit_are_refused(tree):
    path = Path(stem_of(tree, 0) + "_seg.png")
    sound = np.asarray(Image.open(path))
    odd = sound.copy()
    odd[..., 0] += 1
    Image.fromarray(odd).save(path)
    with pytest.raises(BadRecord, match="multiple of 10"):
        annotate(tree)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadRecord, match="do not decode"):
        annotate(tree)
    Image.fromarray(sound).save(path)
    Path(stem_of(tree, 0) + ".json").write_text('{"annotation": {}}')
    with pytest.raises(BadRecord, match="jsons that cannot be read"):
        annotate(tree)


def test_a_map_of_another_size_is_refused(tree, tmp_path, capsys):
    path = Path(stem_of(tree, 0) + "_seg.png")
    Image.fromarray(np.asarray(Image.open(path))[:-1]).save(path)
    assert pack("ade20k_full", tree, tmp_path / "out", "val") == 2
    assert "another size" in capsys.readouterr().err


def test_missing_parts_of_the_tree_are_told_with_counts(tree):
    Path(stem_of(tree, 0) + "_seg.png").unlink()
    Path(stem_of(tree, 1) + ".json").unlink()
    shutil.copytree(Path(stem_of(tree, 2)).parent, tree / "images/ADE/validation/again")
    with pytest.raises(UserError) as error:
        ade20k_full.open_source(tree, "val", VOCABULARY)
    assert "without their map or json: 3" in str(error.value) and "the same key: 2" in str(error.value)
    for split in ("train", "../ADE/validation"):
        with pytest.raises(UserError, match="a part of the source is missing"):
            ade20k_full.open_source(tree, split, VOCABULARY)
