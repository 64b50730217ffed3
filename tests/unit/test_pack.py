"""Packing the embedded sample, and broken copies of it."""

from __future__ import annotations

import functools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from data_tools.__main__ import main
from data_tools.dry_run import try_samples
from data_tools.formats import coco_panoptic
from data_tools.pack import PackOptions, plan_pack
from data_tools.source import open_reader
from mf_scale.data.index import Index
from mf_scale.vocabulary import Vocabulary
from tests.unit.packing import SAMPLE, VOCABULARY, copy_of, edit_list, files_of, pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "val"
    assert pack(target, "--shard-size", "5") == 0
    return target


@pytest.fixture
def copy(tmp_path) -> Path:
    return copy_of(SAMPLE, tmp_path / "copy")


def test_the_embedded_sample_is_whole():
    counts = {split: len(list((SAMPLE / split).glob("*.jpg"))) for split in ("train", "val")}
    assert counts == {"train": 40, "val": 13}
    stuff = SAMPLE.parent / "coco_stuff"
    assert len(list(stuff.glob("*/*.jpg"))) == 49
    files = [f for f in SAMPLE.parent.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 6_000_000
    attributed = (SAMPLE.parent / "ATTRIBUTION.md").read_text()
    for image in SAMPLE.parent.rglob("*.jpg"):
        assert f"| {image.relative_to(SAMPLE.parent)} | http" in attributed
    for listing in SAMPLE.parent.rglob("annotations/*.json"):
        assert {image["license"] for image in json.loads(listing.read_text())["images"]} <= {4, 5, 7}


def test_what_is_packed_is_what_was_annotated(packed):
    index = Index.open(packed)
    listing = json.loads((SAMPLE / "annotations" / "panoptic_val.json").read_text())
    of_key = {Path(a["file_name"]).stem: a for a in listing["annotations"]}
    label_of = index.vocabulary.index_of_source_id()
    assert [s.samples for s in index.shards] == [5, 5, 3]
    reader = open_reader(index)
    keys = []
    for i in range(index.samples):
        sample = reader.load_exact(i)
        keys.append(sample.key)
        annotation = of_key[sample.key]
        with Image.open(SAMPLE / "annotations" / "panoptic_val" / annotation["file_name"]) as png:
            colours = np.asarray(png).astype(int) @ np.array([1, 256, 65536])
        with Image.open(SAMPLE / "val" / f"{sample.key}.jpg") as image:
            assert (np.asarray(image.convert("RGB")) == sample.image).all()
        for number, segment in enumerate(annotation["segments_info"]):
            assert ((sample.stored_map[0] == number) == (colours == segment["id"])).all()
            assert sample.labels[number] == label_of[segment["category_id"]]
            assert sample.crowd[number] == bool(segment["iscrowd"])
        assert ((sample.stored_map[0] == 254) == (colours == 0)).all()
    assert sorted(keys) == sorted(of_key) and keys != sorted(keys)


def test_the_same_input_gives_the_same_bytes(packed, tmp_path):
    assert pack(tmp_path / "two", "--shard-size", "5", "--workers", "2") == 0
    assert files_of(tmp_path / "two") == files_of(packed)
    assert pack(tmp_path / "seed", "--shard-size", "5", "--seed", "1") == 0
    assert Index.open(tmp_path / "seed").digest != Index.open(packed).digest


def test_shards_can_be_cut_by_size(tmp_path):
    assert pack(tmp_path / "mib", "--shard-size", "1MiB") == 0
    assert len(Index.open(tmp_path / "mib").shards) == 1
    assert pack(tmp_path / "bad", "--shard-size", "1GB") == 2


def test_a_finished_pack_is_left_alone_and_another_one_refused(packed, capsys):
    before = files_of(packed)
    assert pack(packed, "--shard-size", "5") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert pack(packed, "--shard-size", "5", "--crowd", "ignore") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files_of(packed) == before


def test_overwrite_replaces_and_foreign_files_stay(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert pack(tmp_path) == 2
    assert "notes.txt" in capsys.readouterr().err
    for folder, options in (
        (tmp_path / "a", ["--shard-size", "2"]),
        (tmp_path / "a", ["--crowd", "ignore", "--overwrite"]),
    ):
        assert pack(folder, *options) == 0
    index = Index.open(tmp_path / "a")
    assert index.crowd == "ignore" and len(list((tmp_path / "a").glob("*.tar"))) == len(index.shards) == 1


def test_a_dry_run_counts_and_writes_nothing(packed, tmp_path, capsys):
    assert pack(tmp_path / "dry", "--dry-run", "--shard-size", "5") == 0
    said = capsys.readouterr().out
    listing = json.loads((SAMPLE / "annotations" / "panoptic_val.json").read_text())
    segments = [segment for annotation in listing["annotations"] for segment in annotation["segments_info"]]
    assert "13 samples, 0.5 MiB of images, 3 shards, 133 classes (coco_panoptic_133, panoptic)" in said
    assert f"tried 13 of 13 samples: {len(segments)} segments" in said
    assert f"{len({segment['category_id'] for segment in segments})} classes seen" in said
    assert "shards of 0.5 MiB in all" in said
    assert not (tmp_path / "dry").exists()


def test_a_dry_run_foretells_the_bytes_of_the_shards(packed, tmp_path):
    source = coco_panoptic.open_source(SAMPLE, "val", Vocabulary.load(VOCABULARY))
    packing = plan_pack(source, tmp_path / "dry", PackOptions("coco_panoptic", "val", "5", 0, "none", "none"))
    trial = try_samples(packing, most=0, workers=1, progress=functools.partial(tqdm, disable=True))
    members = []
    for path in packed.glob("*.tar"):
        with tarfile.open(path) as tar:
            members += tar.getmembers()
    assert trial.bytes_of(packing) == sum(512 + -(-member.size // 512) * 512 for member in members)
    half = try_samples(packing, most=6, workers=1, progress=functools.partial(tqdm, disable=True))
    assert half.samples == 6 and half.bytes_of(packing) == pytest.approx(trial.bytes_of(packing), rel=0.1)


def test_a_dry_run_tries_samples(copy, tmp_path, capsys):
    name = sorted((copy / "val").iterdir())[3]
    name.write_bytes(name.read_bytes()[:500])
    assert pack(tmp_path / "dry", "--dry-run", source=copy) == 2
    assert "1 of the 13 samples that were tried cannot be packed: images that do not decode" in capsys.readouterr().err
    assert pack(tmp_path / "dry", "--dry-run", "--check-maps", "2", source=copy) == 0
    assert "tried 2 of 13 samples: about" in capsys.readouterr().out


def test_everything_wrong_in_the_lists_is_told_at_once(copy, tmp_path, capsys):
    def change(data):
        data["annotations"][0]["segments_info"][0]["category_id"] = 999
        data["annotations"][1]["image_id"] = 1
        data["annotations"][2]["segments_info"][0]["id"] = 0
        data["annotations"].append(data["annotations"][3])

    edit_list(copy, change)
    images = sorted((copy / "val").iterdir())
    images[5].unlink()
    (copy / "annotations" / "panoptic_val" / images[6].with_suffix(".png").name).unlink()
    assert pack(tmp_path / "out", source=copy) == 2
    said = capsys.readouterr().err
    for part in ("category 999", "without an image entry: 1", "without annotation: 1", "ids repeat or are 0: 1",
                 "annotated twice", "missing images", images[5].name, "missing maps"):  # fmt: skip
        assert part in said, part
    assert "Traceback" not in said and not (tmp_path / "out").exists()


def test_everything_wrong_in_the_files_is_told_and_a_repaired_source_packs(copy, tmp_path, capsys):
    names = sorted(path.stem for path in (copy / "val").iterdir())
    maps = copy / "annotations" / "panoptic_val"
    data = (copy / "val" / f"{names[0]}.jpg").read_bytes()
    (copy / "val" / f"{names[0]}.jpg").write_bytes(data[: len(data) // 2])
    Image.open(maps / f"{names[1]}.png").crop((0, 0, 50, 50)).save(maps / f"{names[1]}.png")
    Image.new("RGB", Image.open(maps / f"{names[2]}.png").size, (1, 2, 3)).save(maps / f"{names[2]}.png")
    (maps / f"{names[3]}.png").write_bytes(b"no png")

    def change(data):
        of_name = {a["file_name"][:-4]: a for a in data["annotations"]}
        extra = {**of_name[names[4]]["segments_info"][0], "id": 77}
        of_name[names[4]]["segments_info"].append(extra)

    edit_list(copy, change)
    assert pack(tmp_path / "out", "--shard-size", "4", source=copy) == 2
    said = capsys.readouterr().err
    assert "5 samples cannot be packed" in said
    kinds = ("do not decode or have", "size is not that", "does not list", "maps that do not decode", "lack ids")
    for kind, name in zip(kinds, names, strict=False):
        assert kind in said and name in said, kind
    assert not (tmp_path / "out" / "index.json").exists()
    assert pack(tmp_path / "out") == 2
    assert pack(tmp_path / "out", "--overwrite") == 0


def test_label_maps_are_held_against_their_meaning_before_anything_is_written(tmp_path, capsys):
    for folder in ("images", "labels"):
        (tmp_path / "made" / folder).mkdir(parents=True)
    values = np.zeros((20, 30), np.uint8)
    values[:10], values[10:, :5] = 1, 255
    for name in ("a", "Straße 日本", "x" * 150):
        Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "made" / "images" / f"{name}.png")
        Image.fromarray(values).save(tmp_path / "made" / "labels" / f"{name}.png")
    classes = tmp_path / "made" / "classes.json"
    data = {"name": "two", "classes": [{"name": n, "thing": False, "source_id": i} for i, n in enumerate("xy")]}
    command = ["pack", "folder", str(tmp_path / "made"), str(tmp_path / "out"), "--split", "all", "--workers", "1"]
    classes.write_text(json.dumps({**data, "ids": {}}))
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "255 (150 pixels in 3 of 3 maps" in said and not list((tmp_path / "out").glob("*.tar"))
    classes.write_text(json.dumps({**data, "ids": {"ignore": [255]}}))
    assert main([*command, "--dry-run"]) == 0
    assert "2 of 2 classes found; ignored 8.3%" in capsys.readouterr().out
    assert main([*command, "--overwrite"]) == 0
    index = Index.open(tmp_path / "out")
    assert index.kind == "semantic"
    assert sorted(index.table["key"].to_pylist()) == ["Straße_日本", "a", "x" * 150]
    assert main(["verify", str(tmp_path / "out"), "--workers", "1"]) == 0


def test_another_vocabulary_makes_another_pack(packed, tmp_path, capsys):
    data = json.loads(VOCABULARY.read_text())
    data["classes"][0]["thing"] = False
    (tmp_path / "other.json").write_text(json.dumps(data))
    assert pack(packed, "--shard-size", "5", "--vocabulary", str(tmp_path / "other.json")) == 2
    assert "other arguments or input" in capsys.readouterr().err
