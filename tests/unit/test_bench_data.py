"""`mf-scale bench data`: its data, its peers, what it prints and writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from mf_scale.bench.data import Round, measure
from mf_scale.bench.data_inputs import make_source
from mf_scale.bench.data_peers import (
    IGNORED,
    albumentations_sample,
    detectron2_sample,
    peer_input,
    ssd_color,
)
from mf_scale.cli import main
from mf_scale.data.index import Index
from mf_scale.data.reader import SampleReader
from mf_scale.data.samples import webdataset_epoch
from tests import sources


def reader_of(index: Index) -> SampleReader:
    return SampleReader(index, block_samples=8, budget=1 << 26, max_pixels=1 << 20)


def test_contestants_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("albumentations")
    file, cores = tmp_path / "numbers.json", os.sched_getaffinity(0)
    sources.make_source(tmp_path / "packed", [40, 30])
    shape = ["--images=64", "--repeats=1", "--crop", "32", "48"]
    assert main(["bench", "data", f"--source={tmp_path / 'packed'}", *shape, f"--json={file}"]) == 0
    results = json.loads(file.read_text())["results"]
    peer = ["albumentations + cv2", "the same, masks made behind", "the same, no masks at all"]
    images = ["mf_scale", "detectron2's way", *peer]
    raw = ["mf_scale, shuffle blocks", "mf_scale, shuffle full", "webdataset"]
    titles = ["training samples of 32 x 32", "training samples of 48 x 48", "raw samples from tars, shuffled"]
    assert {title: list(rates) for title, rates in results.items()} == dict(
        zip(titles, [images, images, raw], strict=True)
    )
    for rates in results.values():
        ours = next(iter(rates.values()))["samples_per_s"]
        for rate in rates.values():
            assert rate["samples_per_s"] > 0
            assert rate["ours_is_faster"] == pytest.approx(ours / rate["samples_per_s"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed if line[0] != " "][1:] == titles
    assert os.sched_getaffinity(0) == cores and cv2.getNumThreads() > 0


def test_it_makes_its_own_data(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(["bench", "data", "--images=64", "--repeats=1", "--crop=64"]) == 0
    assert "64 made images of 640 x 480" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_rounds_alternate_and_the_first_is_not_counted(monkeypatch) -> None:
    clock, called = [0.0], []
    monkeypatch.setattr("time.process_time", lambda: clock[0])

    def contestant(name: str, seconds: float) -> Round:
        def run(number: int) -> int:
            called.append((name, number))
            clock[0] += seconds * (100 if number == 0 else number)
            return 10

        return run

    rates = measure({"a": contestant("a", 1.0), "b": contestant("b", 4.0)}, 3)
    assert called == [(name, number) for number in range(4) for name in "ab"]
    assert rates["a"] == {"samples_per_s": 5.0, "ours_is_faster": 1.0}  # 10 in 1, 2 and 3 s: the median
    assert rates["b"] == {"samples_per_s": 1.25, "ours_is_faster": 4.0}


def test_too_few_images_are_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", "--images=63"]) == 2
    assert "--images=64" in capsys.readouterr().err
    sources.make_source(tmp_path, [20])
    assert main(["bench", "data", f"--source={tmp_path}"]) == 2
    assert "20 images are too few" in capsys.readouterr().err


def test_made_data_is_a_sound_source_and_always_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    index, again = (make_source(folder, 3, 60, 80) for folder in folders)
    assert (folders[0] / index.shards[0].name).read_bytes() == (folders[1] / again.shards[0].name).read_bytes()
    for i in range(3):
        sample, record = reader_of(index).load_exact(i), index.sample(i)
        assert sample.image.shape == (60, 80, 3) and sample.image.std() > 20
        assert len(sample.labels) == record.segments and len(np.unique(sample.stored_map)) > 8
        assert sorted(set(sample.labels.tolist())) == record.class_ids
    keys = sorted(sample["__key__"] for sample in webdataset_epoch([folders[0] / index.shards[0].name], 10))
    assert keys == [index.sample(i).key for i in range(3)]


@pytest.mark.parametrize("seed", range(6))
def test_peers_make_the_sample_they_are_said_to(tmp_path: Path, seed: int) -> None:
    pytest.importorskip("albumentations")
    reader = reader_of(make_source(tmp_path, 1, 60, 80))
    sample = reader.load_exact(0)
    given = peer_input(reader.members(0).image, sample)
    brightness = np.bincount(sample.stored_map.reshape(-1), sample.image.mean(axis=2).reshape(-1), given.segments)
    colour_of = brightness / np.maximum(np.bincount(sample.stored_map.reshape(-1), minlength=given.segments), 1)
    made = detectron2_sample(given, 48, np.random.default_rng(seed))
    pixels, masks = made["image"].numpy(), made["masks"].numpy()
    assert pixels.shape == (3, 48, 48) and pixels.dtype == np.uint8
    check_masks(masks, given.segments, pixels, colour_of)
    assert made["sem_seg"].shape == (48, 48)
    same = [(masks[s] == (made["sem_seg"] == s).numpy()).mean() for s in range(given.segments)]
    assert min(same) > 0.9  # Pillow and torch do not round to the same nearest pixel
    for way in ("through", "behind"):
        made = albumentations_sample(48, way)(given, np.random.default_rng(seed))
        assert made["image"].shape == (3, 48, 48) and made["image"].dtype == np.uint8
        assert made["masks"].shape == (given.segments, 48, 48) and made["masks"].dtype == bool
        assert made["masks"].sum(axis=0).max() == 1
    made = albumentations_sample(48, "none")(given, np.random.default_rng(seed))
    assert made["map"].shape == (48, 48)
    assert set(np.unique(made["map"])) <= {*range(given.segments), IGNORED}


def check_masks(masks: np.ndarray, segments: int, pixels: np.ndarray, colour_of: np.ndarray) -> None:
    """One for each segment, nowhere two, and brighter segments are brighter in the picture."""
    assert masks.shape == (segments, 48, 48) and masks.dtype == bool
    assert masks.sum(axis=0).max() == 1
    large = [s for s in range(segments) if masks[s].sum() > 60]
    found = [pixels[:, masks[s]].mean() for s in large]
    assert len(large) > 2 and np.corrcoef(found, colour_of[large])[0, 1] > 0.5


def test_ssd_color_moves_everything_and_sometimes_nothing() -> None:
    image = np.full((4, 4, 3), (120, 60, 30), np.uint8)
    results = [ssd_color(image, np.random.default_rng(i))[0, 0].astype(int) for i in range(200)]
    assert 3 <= sum((r == image[0, 0]).all() for r in results) <= 40
    assert {tuple(np.argsort(r)) for r in results} > {(2, 1, 0)}
    brightest = [r.max() for r in results]
    assert max(brightest) > 180 and min(brightest) < 60


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, capsys) -> None:
    assert main(["bench", "data", "--crop", "8"]) == 2
    assert main(["bench", "index", "--samples", "1000"]) == 2
    sources.make_source(tmp_path / "packed", [40, 40], truncated=[7])
    assert main(["bench", "data", "--source", str(tmp_path / "packed"), "--images", "80", "--crop", "32"]) == 2
    assert main(["bench", "index", "--samples", "2000", "--json", str(tmp_path / "nowhere/x.json")]) == 2
    said = capsys.readouterr().err
    for part in ("crop of 8 is too small", "1000 samples are too few", "does not decode", "nowhere/x.json"):
        assert part in said
