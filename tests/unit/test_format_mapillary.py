"""Mapillary Vistas v1.2 and v2.0: 16-bit instance maps, in the layouts of the releases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.formats.label_maps import read_values
from mf_scale.data.batch import IGNORE
from mf_scale.vocabulary import Vocabulary
from tests.unit.map_trees import (
    TWO_PROCESSES,
    Scene,
    check_packed,
    ids_of,
    panoptic_truth,
    save_image,
    save_map,
    scenes,
    vocabulary,
)
from tests.unit.packed_formats import pack

V12, V20 = vocabulary("mapillary_v1.2_65"), vocabulary("mapillary_v2.0_123")
CASES = {"mapillary_v1.2": (V12, "v1.2"), "mapillary_v2.0": (V20, "v2.0")}


def make_tree(folder: Path, classes: Vocabulary, below: str) -> list[Scene]:
    """The training split, with maps in `below`."""
    made = scenes(classes, 4)
    for scene in made:
        ids = ids_of(scene, classes, len(classes))  # the class after the last is unlabelled
        save_image(folder / "training" / "images" / f"{scene.name}.jpg", scene)
        save_map(folder / "training" / below / "instances" / f"{scene.name}.png", 256 * ids + scene.numbers, "I;16")
        save_map(folder / "training" / below / "labels" / f"{scene.name}.png", ids, "P")
    return made


def config(classes: Vocabulary) -> dict:
    labels = [{"readable": c.name, "name": f"x--{i}", "instances": c.thing} for i, c in enumerate(classes.classes)]
    return {"labels": [*labels, {"readable": "Unlabeled", "name": "void--unlabeled", "instances": False}]}


@pytest.mark.parametrize("kind", CASES)
def test_both_versions_in_the_layout_of_the_second_release(kind, tmp_path):
    classes, version = CASES[kind]
    made = make_tree(tmp_path / "vistas", classes, version)
    assert pack(kind, tmp_path / "vistas", tmp_path / "out", "training", *TWO_PROCESSES) == 0
    index = check_packed(tmp_path / "out", {s.name: panoptic_truth(s, IGNORE) for s in made})
    assert index.kind == "panoptic" and len(index.vocabulary) == len(classes)


def test_version_1_2_in_the_layout_of_the_first_release(tmp_path):
    made = make_tree(tmp_path / "vistas", V12, "")
    (tmp_path / "vistas" / "config.json").write_text(json.dumps(config(V12)))
    assert pack("mapillary_v1.2", tmp_path / "vistas", tmp_path / "out", "training") == 0
    check_packed(tmp_path / "out", {s.name: panoptic_truth(s, IGNORE) for s in made})


def test_stuff_with_numbers_of_instances_is_one_segment(tmp_path):
    made = make_tree(tmp_path / "vistas", V12, "v1.2")
    for path in (tmp_path / "vistas" / "training" / "v1.2" / "instances").iterdir():
        values = read_values(path).copy()
        stuff = ~np.array([*V12.things, False])[values // 256]
        values[:100][stuff[:100]] += 9
        save_map(path, values, "I;16")
    assert pack("mapillary_v1.2", tmp_path / "vistas", tmp_path / "out", "training") == 0
    check_packed(tmp_path / "out", {s.name: panoptic_truth(s, IGNORE) for s in made})


def test_the_release_says_which_classes_have_instances(tmp_path):
    make_tree(tmp_path / "vistas", V20, "v2.0")
    changed = config(V20)
    changed["labels"][0]["instances"] = False
    (tmp_path / "vistas" / "config_v2.0.json").write_text(json.dumps(changed))
    assert pack("mapillary_v2.0", tmp_path / "vistas", tmp_path / "out", "training") == 0
    from mf_scale.data.index import Index

    assert Index.open(tmp_path / "out").vocabulary.things == [False, *V20.things[1:]]


def test_a_config_with_other_classes_is_refused(tmp_path, capsys):
    make_tree(tmp_path / "vistas", V12, "v1.2")
    path = tmp_path / "vistas" / "config_v1.2.json"
    other = config(V12)
    other["labels"][3]["readable"] = "Hedge"
    path.write_text(json.dumps(other))
    assert pack("mapillary_v1.2", tmp_path / "vistas", tmp_path / "out", "training") == 2
    assert "id 3 is 'Hedge' in the config and 'Fence'" in capsys.readouterr().err
    path.write_text("[1, 2]")
    assert pack("mapillary_v1.2", tmp_path / "vistas", tmp_path / "out", "training") == 2
    assert "the config cannot be read" in capsys.readouterr().err


def test_maps_of_the_other_version_are_refused(tmp_path, capsys):
    make_tree(tmp_path / "vistas", V20, "v1.2")
    assert pack("mapillary_v1.2", tmp_path / "vistas", tmp_path / "out", "training") == 2
    assert "neither ids of vocabulary mapillary_v1.2_65" in capsys.readouterr().err
