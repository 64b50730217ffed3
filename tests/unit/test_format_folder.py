"""Format `folder`: images, label maps, and a file that says what their values are."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import record
from data_tools.formats.label_maps import annotate_values, changes_of, payload_codes, read_codes, read_values
from data_tools.record import BadRecord, Record
from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.ids import IdMeaning
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.unit.map_trees import TWO_PROCESSES, Truth, check_packed, save_image, save_map, scenes, semantic_truth
from tests.unit.packed_formats import pack

NAMES = ("person", "vehicle", "animal", "ground", "plants")
CLASSES = Vocabulary("mine", tuple(ClassInfo(name, i < 3, i) for i, name in enumerate(NAMES)))
SCENES = scenes(CLASSES, 5)
COLOURS = [[220, 20, 60], [0, 0, 142], [70, 70, 70], [0, 128, 255], [1, 0, 0]]


def make_tree(folder: Path, values_of, mode: str, split: str = "", **declared: object) -> Path:
    """images, labels and classes.json; `values_of` makes a map's values of a scene's labels (-1 not annotated)."""
    for scene in SCENES:
        save_image(folder / "images" / split / f"{scene.name}.jpg", scene)
        save_map(folder / "labels" / split / f"{scene.name}.png", values_of(scene.labels), mode)
    (folder / "classes.json").write_text(json.dumps({**CLASSES.to_dict(), **declared}))
    return folder


def truths(otherwise: int = IGNORE):
    return {s.name: semantic_truth(s, otherwise) for s in SCENES}


@pytest.mark.parametrize(
    ("mode", "void", "shift"),
    [("L", 255, 0), ("P", 255, 0), ("L", 0, 1), ("P", 7, 10), ("I;16", 65535, 300), ("I;16", 255, 0)],
)
@pytest.mark.parametrize("meaning", ["ignore", "background"])
def test_grey_palette_and_deep_maps_with_any_value_for_void(tmp_path, mode, void, shift, meaning):
    tree = make_tree(
        tmp_path / "tree",
        lambda labels: np.where(labels < 0, void, labels + shift),
        mode,
        ids={meaning: [void], "offset": -shift},
    )
    assert pack("folder", tree, tmp_path / "out", "all") == 0
    index = check_packed(tmp_path / "out", truths(IGNORE if meaning == "ignore" else NONE))
    assert index.kind == "semantic" and index.vocabulary.names == list(NAMES)


def test_ids_coded_in_red_green_and_blue(tmp_path):
    ids = np.array([5, 700, 70_000, 16_000_000, 9, 0xFFFFFF])
    classes = [{**c, "source_id": int(ids[i])} for i, c in enumerate(CLASSES.to_dict()["classes"])]
    tree = make_tree(
        tmp_path / "tree",
        lambda labels: ids[labels],
        "RGB",
        classes=classes,
        encoding="rgb",
        ids={"ignore": [0xFFFFFF]},
    )
    assert pack("folder", tree, tmp_path / "out", "all") == 0
    check_packed(tmp_path / "out", truths())


def test_colours_of_classes(tmp_path, capsys):
    codes = np.array([r + 256 * g + 65536 * b for r, g, b in [*COLOURS, [0, 0, 0]]])
    classes = [{"name": c.name, "thing": c.thing, "color": COLOURS[i]} for i, c in enumerate(CLASSES.classes)]
    tree = make_tree(
        tmp_path / "tree",
        lambda labels: codes[labels],
        "RGB",
        split="fold-1",
        classes=classes,
        encoding="colors",
        ids={"ignore": [[0, 0, 0]]},
    )
    assert pack("folder", tree, tmp_path / "out", "fold-1", *TWO_PROCESSES) == 0
    check_packed(tmp_path / "out", truths())
    path = tree / "labels" / "fold-1" / f"{SCENES[0].name}.png"
    save_map(path, np.full(SCENES[0].labels.shape, 1 + 256 * 2 + 65536 * 3), "RGB")
    assert pack("folder", tree, tmp_path / "again", "fold-1") == 2
    assert "RGB(1, 2, 3)" in capsys.readouterr().err


@pytest.mark.parametrize("numbered", [True, False])
def test_classes_as_text(tmp_path, numbered):
    tree = make_tree(tmp_path / "tree", lambda labels: np.where(labels < 0, 3, labels), "L")
    (tree / "classes.json").unlink()
    lines = [f"{i}: {name}" if numbered else name for i, name in enumerate(NAMES)]
    (tree / "classes.txt").write_text("\n".join(reversed(lines) if numbered else lines) + "\n", encoding="utf-8-sig")
    assert pack("folder", tree, tmp_path / "out", "all") == 0
    expected = {}
    for scene in SCENES:
        values = np.where(scene.labels < 0, 3, scene.labels)
        labels = len(NAMES) - 1 - values if numbered else values
        expected[scene.name] = Truth(labels, labels, np.zeros(labels.shape, bool))
    index = check_packed(tmp_path / "out", expected)
    assert index.vocabulary.names == list(NAMES)[:: -1 if numbered else 1]


def test_names_in_any_script_stay_apart(tmp_path):
    tree = make_tree(tmp_path / "tree", lambda labels: np.maximum(labels, 0), "L")
    for old, new in zip(SCENES, ("東京", "東北", "größe 1", "größe.1x", "é"), strict=True):
        for part, suffix in (("images", "jpg"), ("labels", "png")):
            (tree / part / f"{old.name}.{suffix}").rename(tree / part / f"{new}.{suffix}")
    assert pack("folder", tree, tmp_path / "out", "all") == 0
    from mf_scale.data.index import Index

    index = Index.open(tmp_path / "out")
    keys = {index.sample(i).key for i in range(index.samples)}
    assert keys == {"東京", "東北", "größe_1", "größe_1x", "é"}


def test_files_that_cannot_be_told_apart_are_refused(tmp_path, capsys):
    tree = make_tree(tmp_path / "tree", lambda labels: np.maximum(labels, 0), "L")
    first, second = SCENES[0].name, SCENES[1].name
    for part, suffix in (("images", "jpg"), ("labels", "png")):
        (tree / part / f"{first}.{suffix}").rename(tree / part / f"a b.{suffix}")
        (tree / part / f"{second}.{suffix}").rename(tree / part / f"a_b.{suffix}")
    assert pack("folder", tree, tmp_path / "out", "all") == 2
    assert "names with one key: 1 (a_b)" in capsys.readouterr().err
    SCENES[2].image.save(tree / "images" / f"{SCENES[2].name}.png")
    assert pack("folder", tree, tmp_path / "out", "all") == 2
    assert "files of one name: 1 (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"encoding": "bits"}, "encoding 'bits' is none of values, rgb, colors"),
        ({"ids": {"ignored": [255]}}, "unknown ['ignored']"),
        ({"ids": [255]}, "the meaning of ids cannot be read"),
        ({"encoding": "colors"}, "KeyError 'color'"),
        (
            {"encoding": "colors", "classes": [{"name": "a", "thing": True, "color": [0, 0, 256]}]},
            "[0, 0, 256] is no [R, G, B]",
        ),
        ({"classes": [{"name": "a", "thing": True}]}, "source_id"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_told(tmp_path, capsys, declared, told):
    tree = make_tree(tmp_path / "tree", lambda labels: np.maximum(labels, 0), "L", **declared)
    assert pack("folder", tree, tmp_path / "out", "all") == 2
    error = capsys.readouterr().err
    assert told in error and "classes.json" in error


def test_what_is_missing_is_told(tmp_path, capsys):
    (tmp_path / "tree").mkdir()
    assert pack("folder", tmp_path / "tree", tmp_path / "out", "all") == 2
    assert "classes.txt" in capsys.readouterr().err
    tree = make_tree(tmp_path / "tree", lambda labels: np.maximum(labels, 0), "L")
    assert pack("folder", tree, tmp_path / "out", "train") == 2
    assert "--split all" in capsys.readouterr().err
    vocabulary = Path(tree / "classes.json")
    assert pack("folder", tree, tmp_path / "out", "all", "--vocabulary", str(vocabulary)) == 2
    assert "classes.json" in capsys.readouterr().err


def test_a_changed_declaration_is_another_pack(tmp_path, capsys):
    tree = make_tree(tmp_path / "tree", lambda labels: np.where(labels < 0, 255, labels), "L", ids={"ignore": [255]})
    assert pack("folder", tree, tmp_path / "out", "all") == 0
    make_tree(tree, lambda labels: np.where(labels < 0, 255, labels), "L", ids={"background": [255]})
    assert pack("folder", tree, tmp_path / "out", "all") == 2
    assert "other arguments or input" in capsys.readouterr().err


def test_the_fingerprint_changes_with_what_an_id_means():
    ignored, background = IdMeaning(ignore=(0,)), IdMeaning(background=(0,))
    swapped = Vocabulary("mine", tuple(replace(c, source_id=4 - c.source_id) for c in CLASSES.classes))
    assert CLASSES.digest == swapped.digest  # names and kinds alone
    changes = {changes_of(*meaning, []) for meaning in ((CLASSES, ignored), (CLASSES, background), (swapped, ignored))}
    assert len(changes) == 3


@pytest.mark.parametrize("hashed", [1 << 20, 0])
def test_the_fingerprint_changes_with_a_corrected_map_and_not_with_a_copy(tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(record, "HASHED", hashed)
    for city in "ab":
        save_map(tmp_path / "maps" / city / "x.png", np.full((3, 4), ord(city)))
    sizes = {path.stat().st_size for path in (tmp_path / "maps").glob("*/x.png")}
    assert len(sizes) == 1

    def found(folder: Path) -> str:
        return changes_of(CLASSES, IdMeaning(), folder.glob("*/*.png"))

    before = found(tmp_path / "maps")
    shutil.copytree(tmp_path / "maps", tmp_path / "copy", copy_function=shutil.copy2 if hashed == 0 else shutil.copy)
    assert found(tmp_path / "copy") == before
    save_map(tmp_path / "copy" / "a" / "x.png", np.full((3, 4), ord("c")))
    assert {path.stat().st_size for path in (tmp_path / "copy").glob("*/x.png")} == sizes
    assert found(tmp_path / "copy") != before
    (tmp_path / "maps" / "b").rename(tmp_path / "maps" / "d")  # the same files in another folder
    assert found(tmp_path / "maps") != before


def test_one_large_value_takes_no_memory(tmp_path):
    save_map(tmp_path / "a.png", np.full((3, 4), 0xFFFFFF), "RGB")
    one = Record("a", tmp_path / "a.png", {}, tmp_path / "a.png")
    tracemalloc.start()
    with pytest.raises(BadRecord, match="value 16777215"):
        annotate_values(one, values=payload_codes, ids=IdMeaning(), vocabulary=CLASSES)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def png(path: Path, depth: int, colour: int, rows: list[bytes], size: tuple[int, int]) -> Path:
    """A PNG written by hand: Pillow writes no grey of 2 and 4 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def test_maps_that_can_be_read_in_two_ways_or_not_at_all_are_refused(tmp_path):
    path = tmp_path / "a.png"
    for depth, row in ((1, b"\xa0"), (2, b"\x1b"), (4, b"\x12\x34")):
        with pytest.raises(BadRecord, match="fewer than 8 bits"):
            read_values(png(path, depth, 0, [row], (4, 1)))
    assert read_values(png(path, 8, 0, [b"\1\2\3\4"], (4, 1))).tolist() == [[1, 2, 3, 4]]
    deep = read_values(png(path, 16, 0, [b"\1\0\0\2"], (2, 1)))
    assert deep.tolist() == [[256, 2]] and deep.dtype == np.uint16
    # A palette has indices whatever its depth.
    image = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8)).convert("L")
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6])
    image.save(path, bits=2)
    assert path.read_bytes()[24] == 2 and read_values(path).tolist() == [[0, 1, 2, 3]]
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (4, 4)).save(path)
        with pytest.raises(BadRecord, match=f"mode {mode}"):
            read_values(path)
    Image.new("L", (4, 4)).save(path)
    with pytest.raises(BadRecord, match="not in colours"):
        read_codes(path)
    path.write_bytes(b"")
    with pytest.raises(BadRecord, match="do not decode"):
        read_values(path)
    Image.new("L", (4, 4)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(path)
    with pytest.raises(BadRecord, match="do not decode"):
        read_values(path)
    with pytest.raises(BadRecord, match=r"above the limit|do not decode"):
        read_values(png(path, 8, 0, [b"\0"], (30_000, 30_000)))
