"""Cityscapes: instance maps and maps of label ids, in the layout of the release."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.formats.label_maps import read_values
from mf_scale.data.batch import IGNORE, NONE
from tests.unit.map_trees import (
    TWO_PROCESSES,
    Truth,
    check_packed,
    ids_of,
    panoptic_truth,
    save_image,
    save_map,
    scenes,
    semantic_truth,
    vocabulary,
)
from tests.unit.packed_formats import pack

CLASSES = vocabulary("cityscapes_19")
SCENES = scenes(CLASSES, 5)
CITIES = ("aachen", "bremen")
CARAVAN, GROUND = 29, 6
"""Labels outside evaluation, one with instances and one without."""


def frame(place: int) -> str:
    return f"{CITIES[place % 2]}_{place:06d}_000019"


def make_tree(folder: Path) -> None:
    """leftImg8bit and gtFine of two cities, with all files of the release; what COCO leaves open is ground."""
    for place, scene in enumerate(SCENES):
        below = Path("val") / CITIES[place % 2] / frame(place)
        ids = ids_of(scene, CLASSES, GROUND)
        save_image(folder / "leftImg8bit" / f"{below}_leftImg8bit.png", scene)
        save_map(folder / "gtFine" / f"{below}_gtFine_labelIds.png", ids)
        # Numbers of instances start at 0 in Cityscapes.
        instances = np.where(scene.numbers > 0, 1000 * ids + scene.numbers - 1, ids)
        save_map(folder / "gtFine" / f"{below}_gtFine_instanceIds.png", instances, "I;16")
        save_map(folder / "gtFine" / f"{below}_gtFine_color.png", ids, "RGB")
        (folder / "gtFine" / f"{below}_gtFine_polygons.json").write_text("{}")


@pytest.fixture
def tree(tmp_path) -> Path:
    make_tree(tmp_path / "city")
    return tmp_path / "city"


def test_instances_and_stuff_become_segments(tree, tmp_path):
    assert pack("cityscapes", tree, tmp_path / "out", "val", *TWO_PROCESSES) == 0
    truths = {frame(place): panoptic_truth(scene, IGNORE) for place, scene in enumerate(SCENES)}
    index = check_packed(tmp_path / "out", truths)
    assert index.kind == "panoptic"
    assert any((truth.labels == IGNORE).any() for truth in truths.values())


def test_the_semantic_form_reads_label_ids(tree, tmp_path):
    assert pack("cityscapes_semantic", tree, tmp_path / "out", "val", *TWO_PROCESSES) == 0
    truths = {frame(place): semantic_truth(scene) for place, scene in enumerate(SCENES)}
    assert check_packed(tmp_path / "out", truths).kind == "semantic"


def test_groups_are_crowds_and_caravans_are_ignored(tree, tmp_path):
    place, scene = next((i, s) for i, s in enumerate(SCENES) if s.numbers.max() > 2)
    path = tree / "gtFine" / "val" / CITIES[place % 2] / f"{frame(place)}_gtFine_instanceIds.png"
    values = read_values(path).copy()
    group, caravan = scene.numbers == 1, scene.numbers == 2
    values[group] //= 1000
    values[caravan] = 1000 * CARAVAN + 3
    save_map(path, values, "I;16")
    assert pack("cityscapes", tree, tmp_path / "out", "val") == 0
    truths = {frame(i): panoptic_truth(s, IGNORE) for i, s in enumerate(SCENES)}
    truth = truths[frame(place)]
    truths[frame(place)] = Truth(np.where(caravan, IGNORE, truth.labels), truth.segments, group)
    check_packed(tmp_path / "out", truths)


def test_maps_without_a_class_are_refused(tree, tmp_path, capsys):
    """The released maps of the test split are such."""
    for path in tree.rglob("*_gtFine_labelIds.png"):
        save_map(path, np.where(read_values(path) > 0, 3, 0))
    assert pack("cityscapes_semantic", tree, tmp_path / "out", "val") == 2
    error = capsys.readouterr().err
    assert "no map holds a class" in error and "--accept-ids" in error
    assert pack("cityscapes_semantic", tree, tmp_path / "out", "val", "--accept-ids") == 0


def test_a_missing_map_and_a_missing_city_are_told(tree, tmp_path, capsys):
    next(tree.rglob("*_gtFine_instanceIds.png")).unlink()
    assert pack("cityscapes", tree, tmp_path / "out", "val") == 2
    assert "images without a map: 1 (" in capsys.readouterr().err
    (tree / "leftImg8bit" / "train").mkdir()
    (tree / "gtFine" / "train").mkdir()
    assert pack("cityscapes", tree, tmp_path / "out", "train") == 2
    assert "no image with a map was found" in capsys.readouterr().err


def test_the_ids_left_out_are_those_of_the_benchmark():
    from data_tools.formats.cityscapes import IDS

    assert sorted([*IDS.ignore, *(c.source_id for c in CLASSES.classes)]) == list(range(34))
    assert NONE not in IDS.table(CLASSES, 34)
