"""Prediction on image files: what is written, what is refused, what is done all the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mf_scale.errors import UserError
from mf_scale.evaluation.forward import answer
from mf_scale.evaluation.prediction.files import decode_upright
from mf_scale.evaluation.prediction.parts import predict_images
from mf_scale.evaluation.prediction.words import Options
from mf_scale.evaluation.rle import bounding_box, coco_mask
from mf_scale.models.build import build_model
from mf_scale.models.heads import ClassHead
from mf_scale.models.maskformer import MaskFormer
from mf_scale.rundir import MANIFEST, VOCABULARY, RunDir, file_digest
from tests.unit.painted import COLORS, ColorModel, painted_config, write_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run directory with a small real MaskFormer of random weights that keeps every query."""
    config = painted_config(eval__short_side=64, eval__object_threshold=0.0, eval__overlap_threshold=0.0)
    config.model.backbone = replace(config.model.backbone, name="resnet18", weights="none")
    config.model.pixel_decoder = replace(config.model.pixel_decoder, width=16, mask_channels=16)
    config.model.decoder = replace(config.model.decoder, layers=1, queries=9, width=16, heads=2, feedforward=16)
    directory = RunDir(tmp_path_factory.mktemp("run"))
    model = build_model(config.model, 4, seed=0)
    assert isinstance(model, MaskFormer)
    assert isinstance(model.heads.class_head, ClassHead)
    torch.nn.init.constant_(model.heads.class_head.bias[-1:], -20.0)  # no query says no-object
    write_checkpoint(directory, config, model, 3)
    return str(directory.path)


def _image(file: Path, size: tuple[int, int] = (70, 50), **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return file


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_overlay_map_and_segments(run: str, tmp_path: Path, task: str) -> None:
    image = _image(tmp_path / "in" / "a.jpg")
    assert predict_images([str(image)], run, str(tmp_path / "out"), Options(task)) == 0
    assert sorted(f.name for f in (tmp_path / "out").glob("a.*")) == ["a.json", "a.map.png", "a.overlay.png"]
    summary = json.loads((tmp_path / "out" / "a.json").read_text())
    ids = np.asarray(cv2.imread(str(tmp_path / "out" / "a.map.png"), cv2.IMREAD_UNCHANGED))
    if task == "panoptic":
        ids = ids.astype(int) @ [65536, 256, 1]  # as panopticapi's rgb2id, of BGR
    assert ids.shape == (70, 50) == (summary["height"], summary["width"])
    areas = {int(i): int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True)}
    assert areas.pop(0, 0) == summary["void"]["area"]
    assert areas == {s["id"]: s["area"] for s in summary["segments"]}
    names = ["cat", "dog", "sky", "grass"]
    assert all(s["class"] == names[s["label"]] and s["thing"] == (s["label"] < 2) for s in summary["segments"])
    if task == "semantic":
        assert all(s["id"] == s["label"] + 1 for s in summary["segments"]) and summary["void"]["area"] == 0
    else:
        assert all(0 < s["score"] <= 1 for s in summary["segments"])
    with Image.open(tmp_path / "out" / "a.overlay.png") as overlay:
        assert overlay.height > 640, "a legend stands below the picture"


def test_instances_overlap_and_the_best_lies_on_top(run: str, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    image = _image(tmp_path / "a.jpg")
    options = ["eval.instance_top_k=7"]
    assert predict_images([str(image)], run, str(tmp_path / "out"), Options("instance", tuple(options))) == 0
    summary = json.loads((tmp_path / "out" / "a.json").read_text())
    ids = np.asarray(cv2.imread(str(tmp_path / "out" / "a.map.png"), cv2.IMREAD_UNCHANGED))
    assert ids.dtype == np.uint8
    listed, on_top = summary["segments"], np.zeros_like(ids)
    assert 0 < len(listed) <= 7 and [s["id"] for s in listed] == list(range(1, len(listed) + 1))
    for segment in reversed(listed):
        mask = coco.decode(segment["segmentation"]).astype(bool)
        assert mask.shape == (70, 50) and mask.sum() == segment["area"] > 0
        assert coco.toBbox(segment["segmentation"]).tolist() == segment["bbox"]
        assert segment["thing"] and segment["class"] in ("cat", "dog")
        on_top[mask] = segment["id"]
    assert np.array_equal(ids, on_top) and summary["void"]["area"] == (ids == 0).sum()
    scores = [s["score"] for s in listed]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0
    assert sum(s["area"] for s in listed) > (ids > 0).sum(), "some lie over others"


def test_instances_need_things_and_the_score_threshold_is_told(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, high = _image(tmp_path / "a.png"), ["eval.instance_threshold=1.0"]
    assert predict_images([str(image)], run, str(tmp_path / "out"), Options("instance", tuple(high))) == 0
    assert "no segment was found in 1 of them (eval.instance_threshold=1)" in capsys.readouterr().out
    stuff = tmp_path / "stuff"
    shutil.copytree(RunDir(Path(run)).checkpoint(3), stuff)
    (stuff / VOCABULARY).write_text((stuff / VOCABULARY).read_text().replace("true", "false"))
    manifest = json.loads((stuff / MANIFEST).read_text())
    entry = {"size": (stuff / VOCABULARY).stat().st_size, "sha256": file_digest(stuff / VOCABULARY)}
    (stuff / MANIFEST).write_text(json.dumps({**manifest, "files": {**manifest["files"], VOCABULARY: entry}}))
    with pytest.raises(UserError, match=r"has no thing class.*--task semantic or panoptic"):
        predict_images([str(image)], str(stuff), str(tmp_path / "other"), Options("instance"))


@given(height=st.integers(1, 40), width=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_masks_are_written_as_coco_writes_them(height: int, width: int, share: float, seed: int) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(seed).random((height, width)) < share
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert coco_mask(mask) == {"size": [height, width], "counts": expected["counts"].decode()}
    assert bounding_box(mask) == coco.toBbox(expected).tolist()


def test_long_runs_take_several_characters() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((3000, 2000), dtype=bool)
    mask[7, 0] = mask[2999, 1999] = mask[100:2000, 3:900] = True
    assert coco_mask(mask)["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


@pytest.mark.parametrize("size", [(3, 2000), (2000, 3), (1, 1)])
@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_strips_are_predicted_at_their_own_size(run: str, tmp_path: Path, size: tuple[int, int], task: str) -> None:
    """Resized for inference these are thinner than a cell of the coarsest map."""
    image = _image(tmp_path / "a.png", size)
    assert predict_images([str(image)], run, str(tmp_path / "out"), Options(task)) == 0
    assert cv2.imread(str(tmp_path / "out" / "a.map.png"), cv2.IMREAD_UNCHANGED).shape[:2] == size  # type: ignore[union-attr]


def test_what_a_strip_is_widened_by_is_left_out_of_the_answer() -> None:
    pixels = np.zeros((4, 400, 3), dtype=np.uint8)
    pixels[:, :200], pixels[:, 200:] = COLORS[0], COLORS[1]
    said = answer(ColorModel(), pixels, painted_config(eval__max_side=400))
    assert said.prediction.pixel_embeddings.shape[-2:] == (8, 100) and said.extent == (1.0, 100.0)
    assert np.array_equal(said.semantic(), np.arange(400)[None].repeat(4, 0) >= 200)


def test_folders_and_names_that_stand_twice(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x/a.jpg", "x/b.PNG", "y/a.webp"):
        _image(tmp_path / name, (40, 40))
    (tmp_path / "x" / "notes.txt").write_text("no image, not asked for")
    inputs = [str(tmp_path / "x"), str(tmp_path / "y" / "a.webp")]
    assert predict_images(inputs, run, str(tmp_path / "out"), Options("panoptic")) == 0
    assert sorted(f.name for f in (tmp_path / "out").glob("[ab]*.json")) == ["a-2.json", "a.json", "b.json"]
    assert json.loads((tmp_path / "out" / "a-2.json").read_text())["image"].endswith("y/a.webp")
    assert "3 of 3 images" in capsys.readouterr().out


def test_nothing_above_the_threshold_is_told(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = _image(tmp_path / "a.png")
    high = ["eval.object_threshold=1.0"]
    assert predict_images([str(image)], run, str(tmp_path / "out"), Options("panoptic", tuple(high))) == 0
    assert "no segment was found in 1 of them (eval.object_threshold=1, " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "a.json").read_text())["segments"] == []


def test_one_input_that_is_no_image(run: str, tmp_path: Path) -> None:
    file = tmp_path / "note.jpg"
    file.write_text("hello")
    with pytest.raises(UserError, match=r"note\.jpg"):
        predict_images([str(file)], run, str(tmp_path / "out"), Options("panoptic"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not exist"):
        predict_images([str(tmp_path / "gone.jpg")], run, str(tmp_path / "out"), Options("panoptic"))


def test_among_several_the_others_are_done(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = _image(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    assert predict_images([str(bad), str(good)], run, str(tmp_path / "out"), Options("semantic")) == 2
    assert (tmp_path / "out" / "good.json").exists() and not (tmp_path / "out" / "bad.json").exists()
    printed = capsys.readouterr()
    assert "1 of 2 images" in printed.out and "bad.png" in printed.err


def test_nothing_to_do_and_nowhere_to_write(run: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in what was given"):
        predict_images([str(tmp_path / "empty")], run, str(tmp_path / "out"), Options("panoptic"))
    (tmp_path / "file").write_text("")
    image = _image(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot write"):
        predict_images([str(image)], run, str(tmp_path / "file" / "out"), Options("panoptic"))


def test_images_are_read_upright_and_their_size_is_limited(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = _image(tmp_path / "turned.jpg", (40, 20), exif=exif)
    assert decode_upright(file.read_bytes(), 10_000, str(file)).shape == (20, 40, 3)
    grey = tmp_path / "grey.png"
    Image.fromarray(np.zeros((5, 6), dtype=np.uint8)).save(grey)
    assert decode_upright(grey.read_bytes(), 10_000, str(grey)).shape == (5, 6, 3)
    with pytest.raises(UserError, match="limit of 100"):
        decode_upright(file.read_bytes(), 100, str(file))
