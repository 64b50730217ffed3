"""Pascal VOC and Pascal Context, in the layouts of their releases."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from data_tools.formats.label_maps import read_values
from data_tools.formats.mat_files import read_matrix
from data_tools.record import BadRecord
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

VOC, VOC_SEMANTIC = vocabulary("pascal_voc_20"), vocabulary("pascal_voc_21")
SCENES = scenes(VOC, 6)
BORDER = (slice(5, 9), slice(0, 40))


def lists(root: Path, below: str, names: list[str]) -> None:
    path = root / "ImageSets" / below
    path.mkdir(parents=True, exist_ok=True)
    path.joinpath("train.txt").write_text("\n".join(names[:4]) + "\n")
    path.joinpath("val.txt").write_text("\n".join(names[4:]) + "\n")


@pytest.fixture
def devkit(tmp_path) -> Path:
    """VOCdevkit/VOC2012 with four images in train and two in val; a border of 255 crosses every image."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for scene in SCENES:
        save_image(root / "JPEGImages" / f"2007_{scene.name}.jpg", scene)
        for kind, values in (("Class", ids_of(scene, VOC, 0)), ("Object", scene.numbers)):
            drawn = values.copy()
            drawn[BORDER] = 255
            save_map(root / f"Segmentation{kind}" / f"2007_{scene.name}.png", drawn, "P")
    save_image(root / "JPEGImages" / "2007_unlisted.jpg", SCENES[0])
    lists(root, "Segmentation", [f"2007_{s.name}" for s in SCENES])
    return tmp_path / "VOCdevkit"


def bordered(truth: Truth) -> Truth:
    truth.labels[BORDER] = IGNORE
    return truth


@pytest.mark.parametrize("below", ["", "VOC2012", ".."])
def test_objects_are_segments_and_the_background_is_none(devkit, tmp_path, below):
    assert pack("voc", devkit / below, tmp_path / "out", "train", *TWO_PROCESSES) == 0
    truths = {f"2007_{s.name}": bordered(panoptic_truth(s, NONE)) for s in SCENES[:4]}
    assert check_packed(tmp_path / "out", truths).kind == "panoptic"


def test_the_semantic_form_has_the_background_as_a_class(devkit, tmp_path):
    assert pack("voc_semantic", devkit, tmp_path / "out", "val") == 0
    truths = {}
    for scene in SCENES[4:]:
        labels = scene.labels + 1  # not annotated is -1: background
        labels[BORDER] = IGNORE
        truths[f"2007_{scene.name}"] = Truth(labels, labels, np.zeros(labels.shape, bool))
    index = check_packed(tmp_path / "out", truths)
    assert index.kind == "semantic" and index.vocabulary.names[0] == "background"


def test_where_the_two_maps_disagree_pixels_are_ignored_and_counted(devkit, tmp_path, capsys):
    scene = next(s for s in SCENES[:4] if (s.numbers == 1).sum() > 2000)
    path = devkit / "VOC2012" / "SegmentationObject" / f"2007_{scene.name}.png"
    rows, columns = (
        part[:7] for part in np.nonzero((scene.numbers == 1) & (np.arange(len(scene.labels)) > 8)[:, None])
    )
    values = read_values(path).copy()
    values[rows, columns] = 0
    save_map(path, values, "P")
    assert pack("voc", devkit, tmp_path / "out", "train") == 0
    truths = {f"2007_{s.name}": bordered(panoptic_truth(s, NONE)) for s in SCENES[:4]}
    truths[f"2007_{scene.name}"].labels[rows, columns] = IGNORE
    check_packed(tmp_path / "out", truths)
    assert "maps of classes and objects disagree, ignored: 7" in capsys.readouterr().out
    save_map(path, np.where(values == 1, 0, values), "P")
    assert pack("voc", devkit, tmp_path / "again", "train") == 2
    assert "disagree in more than 1% of the pixels" in capsys.readouterr().err


def test_a_list_that_names_what_is_not_there_is_refused(devkit, tmp_path, capsys):
    listing = devkit / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    first = f"2007_{SCENES[0].name}"
    listing.write_text(f"{first}\n2007_gone\n../../etc/passwd\n{first}\n")
    assert pack("voc", devkit, tmp_path / "out", "train") == 2
    error = capsys.readouterr().err
    assert "listed names without an image: 2 (2007_gone, ../../etc/passwd)" in error and "listed twice: 1" in error


def test_a_border_that_was_declared_a_class_is_refused(devkit, tmp_path, capsys):
    for path in (devkit / "VOC2012" / "SegmentationClass").iterdir():
        values = read_values(path).copy()
        values[values == 255] = 21
        save_map(path, values, "P")
    assert pack("voc_semantic", devkit, tmp_path / "out", "train") == 2
    assert "21 (640 pixels in 4 of 4 maps" in capsys.readouterr().err


CONTEXT = vocabulary("pascal_context_59")


def test_context_59_reads_maps_and_ignores_zero(tmp_path):
    root, made = tmp_path / "VOC2010", scenes(CONTEXT, 5)
    for scene in made:
        save_image(root / "JPEGImages" / f"{scene.name}.jpg", scene)
        save_map(root / "SegmentationClassContext" / f"{scene.name}.png", ids_of(scene, CONTEXT, 0), "P")
    lists(root, "SegmentationContext", [s.name for s in made])
    assert pack("context_59", tmp_path, tmp_path / "out", "train", *TWO_PROCESSES) == 0
    check_packed(tmp_path / "out", {s.name: semantic_truth(s) for s in made[:4]})


def test_context_459_reads_the_release(tmp_path):
    classes = vocabulary("pascal_context_459")
    made = scenes(classes, 5)
    for place, scene in enumerate(made):
        save_image(tmp_path / "VOC2010" / "JPEGImages" / f"{scene.name}.jpg", scene)
        (tmp_path / "trainval").mkdir(exist_ok=True)
        ids = ids_of(scene, classes, 0).astype([np.uint16, np.float64][place % 2])
        savemat(tmp_path / "trainval" / f"{scene.name}.mat", {"LabelMap": ids}, do_compression=place < 3)
    lists(tmp_path / "VOC2010", "Main", [s.name for s in made])
    assert pack("context_459", tmp_path, tmp_path / "out", "train", *TWO_PROCESSES) == 0
    index = check_packed(tmp_path / "out", {s.name: semantic_truth(s) for s in made[:4]})
    assert max(c for i in range(index.samples) for c in index.sample(i).class_ids) > 255


def test_mat_files_are_not_trusted(tmp_path):
    path = tmp_path / "a.mat"
    bad: dict[str, dict] = {
        "structs": {"LabelMap": {"a": 1}},
        "cells": {"LabelMap": np.array([[1, "x"]], dtype=object)},
        "text": {"LabelMap": "hello"},
        "another name": {"S": np.ones((3, 4))},
        "three axes": {"LabelMap": np.ones((3, 4, 2))},
        "fractions": {"LabelMap": np.full((3, 4), 0.5)},
        "negative": {"LabelMap": np.full((3, 4), -1)},
        "infinite": {"LabelMap": np.full((3, 4), np.inf)},
        "empty": {"LabelMap": np.ones((0, 4))},
        "complex": {"LabelMap": np.full((3, 4), 1j)},
    }
    for what, content in bad.items():
        savemat(path, content)
        with pytest.raises(BadRecord):
            read_matrix(path, "LabelMap")
            pytest.fail(what)
    savemat(path, {"LabelMap": np.arange(12).reshape(3, 4), "other": {"struct": 1}}, do_compression=True)
    assert read_matrix(path, "LabelMap").tolist() == np.arange(12).reshape(3, 4).tolist()
    whole = path.read_bytes()
    for cut in (0, 60, 130, 160, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadRecord):
            read_matrix(path, "LabelMap")
            pytest.fail(f"cut at {cut}")
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 600)
    with pytest.raises(BadRecord):
        read_matrix(path, "LabelMap")


def big_endian(values: np.ndarray, name: bytes) -> bytes:
    """A MATLAB file as machines of the other byte order wrote it, its name a small element."""

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack(">II", kind, len(content)) + content + b"\0" * (-len(content) % 8)

    small_name = struct.pack(">HH", len(name), 1) + name.ljust(4, b"\0")
    parts = element(6, struct.pack(">II", 6, 0)) + element(5, struct.pack(">ii", *values.shape)) + small_name
    matrix = element(14, parts + element(4, values.astype(">u2").tobytes(order="F")))
    return b"MATLAB 5.0".ljust(124) + b"\x01\x00MI" + matrix


def test_mat_files_of_the_other_byte_order_are_read(tmp_path):
    values = np.arange(600).reshape(20, 30)
    (tmp_path / "a.mat").write_bytes(big_endian(values, b"S"))
    assert (read_matrix(tmp_path / "a.mat", "S") == values).all()


@pytest.mark.parametrize("compressed", [False, True])
def test_broken_mat_files_are_read_or_refused_and_never_crash(tmp_path, compressed):
    path, draw = tmp_path / "a.mat", random.Random(0)
    content = {"other": {"a": "x"}, "LabelMap": np.arange(400).reshape(20, 20)}
    savemat(path, content, do_compression=compressed)
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            broken[draw.randrange(100, len(broken))] = draw.randrange(256)
        path.write_bytes(broken)
        try:
            read_matrix(path, "LabelMap")
        except BadRecord:
            refused += 1
    assert refused > 30


def test_a_mat_file_that_unpacks_without_end_is_refused_before_it_does(tmp_path, monkeypatch):
    from data_tools.formats import mat_files

    path = tmp_path / "bomb.mat"
    savemat(path, {"LabelMap": np.zeros((4096, 4096), np.uint8)}, do_compression=True)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(mat_files, "LIMIT", 1 << 22)
    with pytest.raises(BadRecord, match="unpack to more than 4 MiB"):
        read_matrix(path, "LabelMap")
