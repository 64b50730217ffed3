"""ADE20K: SceneParse150 and its panoptic form, in the layout of the release."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.formats.label_maps import read_values
from mf_scale.data.batch import IGNORE, NONE
from tests.unit.map_trees import (
    TWO_PROCESSES,
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

CLASSES = vocabulary("ade20k_150")
SCENES = scenes(CLASSES, 6)


def make_tree(folder: Path, split: str = "training") -> None:
    """ADEChallengeData2016 with annotations_instance."""
    things = [label for label, thing in enumerate(CLASSES.things) if thing]
    thing_of = {label: number for number, label in enumerate(things, start=1)}
    for scene in SCENES:
        save_image(folder / "images" / split / f"ADE_train_{scene.name}.jpg", scene)
        save_map(folder / "annotations" / split / f"ADE_train_{scene.name}.png", ids_of(scene, CLASSES, 0))
        kinds = np.array([thing_of.get(label, 0) for label in range(len(CLASSES))] + [0])[scene.labels]
        save_map(
            folder / "annotations_instance" / split / f"ADE_train_{scene.name}.png",
            kinds + 256 * scene.numbers,
            "RGB",
        )


@pytest.fixture
def tree(tmp_path) -> Path:
    make_tree(tmp_path / "ade")
    return tmp_path / "ade"


def test_zero_is_ignored_and_ids_start_at_one(tree, tmp_path, capsys):
    assert pack("ade20k_150", tree, tmp_path / "out", "training", *TWO_PROCESSES) == 0
    index = check_packed(tmp_path / "out", {f"ADE_train_{s.name}": semantic_truth(s, IGNORE) for s in SCENES})
    assert index.kind == "semantic" and index.vocabulary.names[0] == "wall"
    assert "6 of 6 maps read" in capsys.readouterr().out


def test_instances_lie_over_stuff_and_zero_is_unlabelled(tree, tmp_path):
    assert pack("ade20k_panoptic", tree, tmp_path / "out", "training", *TWO_PROCESSES) == 0
    index = check_packed(tmp_path / "out", {f"ADE_train_{s.name}": panoptic_truth(s, NONE) for s in SCENES})
    assert index.kind == "panoptic"
    assert max(index.sample(i).segments for i in range(index.samples)) > 8


def test_a_thing_without_an_instance_is_unlabelled_and_an_instance_covers_stuff(tree, tmp_path):
    scene = next(s for s in SCENES if s.numbers.max() > 1)
    path = tree / "annotations_instance" / "training" / f"ADE_train_{scene.name}.png"
    kinds = np.zeros(scene.labels.shape, np.int32)
    kinds[:20, :30] = 3 + 256 * 7  # over whatever the map of classes has there; all other instances are gone
    save_map(path, kinds, "RGB")
    assert pack("ade20k_panoptic", tree, tmp_path / "out", "training") == 0
    things = np.array(CLASSES.things)
    labels = np.where((scene.labels >= 0) & things[scene.labels], NONE, scene.labels)
    labels[:20, :30] = np.flatnonzero(things)[2]
    truths = {f"ADE_train_{s.name}": panoptic_truth(s, NONE) for s in SCENES}
    truth = truths[f"ADE_train_{scene.name}"]
    truths[f"ADE_train_{scene.name}"] = type(truth)(labels, labels, truth.crowd)
    check_packed(tmp_path / "out", truths)


def test_the_things_of_the_vocabulary_are_the_hundred_of_the_instance_maps():
    # Classes 1, 2, 50 and 100 of the instance challenge are bed, windowpane, … in SceneParse150's ids 8, 9, 88 and 150.
    things = [c.source_id for c in CLASSES.classes if c.thing]
    assert len(things) == 100
    assert [things[number - 1] for number in (1, 2, 3, 4, 100)] == [8, 9, 11, 13, 150]


def test_what_does_not_fit_is_refused_with_counts(tree, tmp_path, capsys):
    maps = tree / "annotations" / "training"
    names = sorted(path.name for path in maps.iterdir())
    (maps / names[0]).unlink()
    (maps / "ADE_train_stray.png").write_bytes((maps / names[1]).read_bytes())
    assert pack("ade20k_150", tree, tmp_path / "out", "training") == 2
    error = capsys.readouterr().err
    assert "images without a map: 1 (" in error and "maps without an image: 1 (ADE_train_stray)" in error
    assert pack("ade20k_150", tree, tmp_path / "out", "validation") == 2
    error = capsys.readouterr().err
    assert "beside it: training" in error and "validation" in error
    maps = tree / "annotations_instance" / "training"
    (maps / names[2]).rename(maps / "ADE_train_other.png")
    (tree / "annotations" / "training" / "ADE_train_stray.png").rename(tree / "annotations" / "training" / names[0])
    assert pack("ade20k_panoptic", tree, tmp_path / "out", "training") == 2
    error = capsys.readouterr().err
    assert "images without a map: 1 (" in error and "maps without an image: 1 (ADE_train_other)" in error
    assert not (tmp_path / "out").exists()


def test_a_value_beyond_the_vocabulary_is_refused_with_its_counts(tree, tmp_path, capsys):
    path = sorted((tree / "annotations" / "training").iterdir())[2]
    values = read_values(path).copy()
    values[:2, :5] = 151
    save_map(path, values)
    assert pack("ade20k_150", tree, tmp_path / "out", "training") == 2
    assert f"151 (10 pixels in 1 of 6 maps: {path.stem})" in capsys.readouterr().err
    # Where the check reads one map only, the packer itself comes upon the value.
    assert pack("ade20k_150", tree, tmp_path / "out", "training", "--check-maps", "1") == 2
    assert f"value 151, which no class has and nothing was declared for: 1 ({path.stem})" in capsys.readouterr().err


def test_instance_maps_that_do_not_fit_are_refused(tree, tmp_path, capsys):
    folder = tree / "annotations_instance" / "training"
    paths = sorted(folder.iterdir())
    shape = SCENES[0].labels.shape
    save_map(paths[0], np.full((shape[0], shape[1] + 1), 1 + 256), "RGB")
    save_map(paths[1], np.full(SCENES[1].labels.shape, 101 + 256), "RGB")
    save_map(paths[2], np.full(SCENES[2].labels.shape, 0 + 256), "RGB")
    paths[3].write_bytes(paths[3].read_bytes()[:400])
    assert pack("ade20k_panoptic", tree, tmp_path / "out", "training") == 2
    error = capsys.readouterr().err
    for part in ("another size", "thing 101, where the vocabulary has 100", "instances of no class", "do not decode"):
        assert part in error
