"""The class lists: every file loads, says where it comes from, and holds what is published about its dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.formats import FORMATS
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

FOLDER = Path(__file__).parents[2] / "data_tools" / "vocabularies"
FILES = sorted(FOLDER.glob("*.json"))
FACTS = {
    # name: classes, things, (label, name, source id) of a few
    "ade20k_150": (150, 100, [(0, "wall", 1), (12, "person", 13), (149, "flag", 150)]),
    "ade20k_full_847": (847, None, [(0, "wall", 2978), (1, "building", 312)]),
    "cityscapes_19": (19, 8, [(0, "road", 7), (10, "sky", 23), (11, "person", 24), (18, "bicycle", 33)]),
    "coco_panoptic_133": (133, 80, [(0, "person", 1), (79, "toothbrush", 90), (132, "rug-merged", 200)]),
    "coco_stuff_171": (171, 80, [(0, "person", 1), (80, "banner", 92), (170, "wood", 182)]),
    "coco_things_80": (80, 80, [(0, "person", 1), (79, "toothbrush", 90)]),
    "lvis_v0.5_1230": (1230, 1230, [(0, "acorn", 1)]),
    "lvis_v1_1203": (1203, 1203, [(0, "aerosol_can", 1), (1202, "zucchini", 1203)]),
    "mapillary_v1.2_65": (65, 37, [(0, "Bird", 0), (13, "Road", 13), (55, "Car", 55), (64, "Ego Vehicle", 64)]),
    "mapillary_v2.0_123": (123, 70, [(0, "Bird", 0), (21, "Road", 21), (108, "Car", 108), (122, "Static", 122)]),
    "pascal_context_59": (59, 20, [(0, "aeroplane", 1), (49, "table", 50), (58, "wood", 59)]),
    "pascal_context_459": (459, 20, [(0, "accordion", 1), (1, "aeroplane", 2), (458, "wool", 459)]),
    "pascal_voc_20": (20, 20, [(0, "aeroplane", 1), (14, "person", 15), (19, "tvmonitor", 20)]),
    "pascal_voc_21": (21, 20, [(0, "background", 0), (1, "aeroplane", 1), (20, "tvmonitor", 20)]),
}
LVIS_V1_BANDS = {"rare": 337, "common": 461, "frequent": 405}


def load(name: str) -> Vocabulary:
    return Vocabulary.load(FOLDER / f"{name}.json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_names_itself_its_source_and_its_licence(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["name"] == path.stem == load(path.stem).name
    assert data["source"].strip() and data["licence"].strip()
    assert path.stem.rpartition("_")[2] == str(len(data["classes"]))
    assert f"| {path.name} |" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_what_is_published(path):
    count, things, known = FACTS[path.stem]
    vocabulary = load(path.stem)
    assert len(vocabulary) == count
    assert things is None or sum(vocabulary.things) == things
    for label, name, source_id in known:
        assert vocabulary.names[label].partition(",")[0] == name and vocabulary.classes[label].source_id == source_id
    assert all(name == name.strip() and name for name in vocabulary.names)


def test_every_format_has_its_vocabulary():
    wanted = {known.vocabulary for known in FORMATS.values()} - {None}
    assert wanted <= {path.name for path in FILES}


def test_bands_of_frequency_are_those_of_lvis():
    bands = [c.frequency for c in load("lvis_v1_1203").classes]
    assert {band: bands.count(band) for band in LVIS_V1_BANDS} == LVIS_V1_BANDS
    for path in FILES:
        assert {c.frequency for c in load(path.stem).classes} <= {"rare", "common", "frequent", None}


def test_lists_of_one_dataset_agree():
    voc, with_background = load("pascal_voc_20"), load("pascal_voc_21")
    assert with_background.classes[1:] == voc.classes
    small, large = load("pascal_context_59"), load("pascal_context_459")
    assert set(small.names) < set(large.names)
    # Both are in alphabetical order, so the 59 stand in the order of the 459.
    assert [name for name in large.names if name in set(small.names)] == small.names
    assert load("coco_panoptic_133").classes[:80] == load("coco_things_80").classes


def test_mapillary_keeps_its_classes_between_versions():
    old, new = load("mapillary_v1.2_65"), load("mapillary_v2.0_123")
    things = dict(zip(new.names, new.things, strict=True))
    kept = [c for c in old.classes if c.name in things]
    assert len(kept) >= 55 and all(things[c.name] == c.thing for c in kept)


def one_class(**more) -> dict:
    return {"name": "v", "classes": [{"name": "x", "thing": True, "source_id": 1, **more}]}


def test_bands_are_read_in_full_or_by_letter_and_nothing_else():
    said: dict[str | None, str | None] = {
        "r": "rare",
        "c": "common",
        "f": "frequent",
        "rare": "rare",
        "frequent": "frequent",
        None: None,
    }
    for frequency, band in said.items():
        assert Vocabulary.from_dict(one_class(frequency=frequency)).classes[0].frequency == band
    assert Vocabulary.from_dict(one_class()).classes[0].frequency is None
    for wrong in ("often", "", 3, ["rare"], True):
        with pytest.raises(UserError, match="is none of rare, common, frequent"):
            Vocabulary.from_dict(one_class(frequency=wrong))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        json.dumps(one_class(source_id=float("inf"))),
        json.dumps(one_class(name="\ud800")),
        json.dumps(one_class(name=None)),
        json.dumps(one_class(thing="false")),
        json.dumps({**one_class(), "name": "\udfff"}),
        "3",
        '"a"',
        "[1]",
    ],
)
def test_a_malformed_file_is_refused(tmp_path, text):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(UserError, match=r"is not JSON|cannot be read"):
        Vocabulary.load(tmp_path / "v.json")
