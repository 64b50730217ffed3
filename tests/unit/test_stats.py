"""Stats and preview: the numbers are those of the annotation, the pictures show something."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.__main__ import main
from data_tools.stats import band_of
from data_tools.stats_picture import draw_counts
from mf_scale.data.index import Index
from tests.sources import make_source
from tests.unit.packing import ROOT, SAMPLE, pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "val"
    assert pack(target, "--shard-size", "5") == 0
    return target


def stats(source: Path, folder: Path, *options: str) -> dict:
    assert main(["stats", str(source), "--json", str(folder / "counts.json"), *options]) == 0
    return json.loads((folder / "counts.json").read_text())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_counts_are_those_of_the_annotation(packed, tmp_path, capsys, workers):
    counts = stats(packed, tmp_path, "--workers", workers)
    listing = json.loads((SAMPLE / "annotations" / "panoptic_val.json").read_text())
    names = {info.source_id: info.name for info in Index.open(packed).vocabulary.classes}
    for row in counts["classes"]:
        ids = {source_id for source_id, name in names.items() if name == row["name"]}
        found = [s for a in listing["annotations"] for s in a["segments_info"] if s["category_id"] in ids]
        images = sum(any(s["category_id"] in ids for s in a["segments_info"]) for a in listing["annotations"])
        assert (row["segments"], row["pixels"]) == (len(found), sum(s["area"] for s in found))
        assert (row["images"], row["crowd"]) == (images, sum(s["iscrowd"] for s in found))
        assert row["frequency"] == band_of(images)
    assert sum(row["pixels"] for row in counts["classes"]) + counts["unlabelled_pixels"] == counts["pixels"]
    lengths = sorted(len(a["segments_info"]) for a in listing["annotations"])
    assert {int(n): k for n, k in counts["segments_per_image"].items()} == {n: lengths.count(n) for n in lengths}
    sizes = [(image["height"], image["width"]) for image in listing["images"]]
    assert {(s["height"], s["width"]): s["images"] for s in counts["sizes"]} == {s: sizes.count(s) for s in sizes}
    said = capsys.readouterr().out
    assert "person" in said and f"{counts['bands']['rare']} rare" in said


def test_bands_are_those_of_lvis_unless_the_vocabulary_has_its_own(tmp_path):
    assert [band_of(n) for n in (0, 1, 10, 11, 100, 101)] == ["absent", "rare", "rare", "common", "common", "frequent"]
    make_source(tmp_path / "source", [3], layers=2)
    head = json.loads((tmp_path / "source" / "index.json").read_text())
    head["vocabulary"]["classes"][0]["frequency"] = "frequent"
    from mf_scale.data.index import head_digest

    (tmp_path / "source" / "index.json").write_text(json.dumps({**head, "digest": head_digest(head)}))
    rows = stats(tmp_path / "source", tmp_path)["classes"]
    assert rows[0]["frequency"] == "frequent" and rows[1]["frequency"] == "rare"


def test_samples_that_do_not_decode_are_counted(tmp_path):
    make_source(tmp_path / "source", [4], truncated=[1])
    counts = stats(tmp_path / "source", tmp_path)
    assert counts["bad_samples"] == 1 and sum(counts["segments_per_image"].values()) == 3


@pytest.mark.parametrize("classes", [1, 4, 40, 41, 1203])
def test_the_picture_of_any_number_of_classes(tmp_path, classes):
    rows = [
        {"name": f"class $ {i}", "thing": i % 2 == 0, "frequency": band_of(n), "images": n, "pixels": 100 * n}
        for i, n in enumerate(2000 // (1 + i) if i % 7 else 0 for i in range(classes))
    ]
    counts = {
        "source": "a/source", "vocabulary": "made", "kind": "panoptic", "samples": 10, "pixels": 10**6,
        "unlabelled_pixels": 5, "ignored_pixels": 6, "bands": {"rare": 1}, "segments_per_image": {"0": 3, "7": 2},
        "sizes": [{"height": 4, "width": 5, "images": 9}], "classes": rows,
    }  # fmt: skip
    draw_counts(counts, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width == 1540 and 600 < picture.height < 1700
        pixels = np.asarray(picture.convert("RGB"))
    colour = np.array([0x31, 0x68, 0x8E])
    assert (pixels == 255).all(axis=-1).mean() > 0.4 and (pixels == colour).all(axis=-1).mean() > 0.005


def test_pictures_are_drawn_by_the_command(packed, tmp_path):
    stats(packed, tmp_path, "--picture", str(tmp_path / "stats.png"))
    assert main(["preview", str(packed), str(tmp_path / "sheet.png"), "--count", "3"]) == 0
    for name in ("stats.png", "sheet.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width in (1540, 1280)
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 200


def test_a_preview_shows_segments_crowds_layers_and_what_does_not_decode(tmp_path):
    from data_tools.preview import draw_sample, name_font
    from data_tools.source import open_reader

    index = make_source(tmp_path / "source", [3], truncated=[1], layers=2)
    good, bad = (np.asarray(draw_sample(open_reader(index), i, name_font())) for i in (0, 1))
    half = good.shape[1] // 2
    drawn = good[18 : 18 + 40, half : half + 56]  # the image is 56 x 40
    assert (drawn[-8:, -3:] < 30).all() and (drawn[:20, :20] > 60).any()  # black at the edge without a segment
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
    assert bad.shape[0] == 54 and ((bad[..., 0] > 200) & (bad[..., 1] < 60)).any()  # said in red


def test_the_documented_commands_are_those_of_the_program(capsys):
    text = (ROOT / "docs" / "data.md").read_text()
    for command in ("pack", "index", "verify", "stats", "preview"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        help_text = capsys.readouterr().out
        for option in {word.strip("[],") for word in help_text.split() if word.strip("[],").startswith("--")}:
            assert option in text or option in ("--help", "--debug"), f"{command} {option} is not in docs/data.md"
