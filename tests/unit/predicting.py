"""For the tests of prediction: a small real run, the bundled images, what a prediction wrote."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mf_scale.evaluation.prediction.parts import predict_images
from mf_scale.evaluation.prediction.words import Options, Share
from mf_scale.models.build import build_model
from mf_scale.models.heads import ClassHead
from mf_scale.models.maskformer import MaskFormer
from mf_scale.rundir import RunDir
from tests.unit.painted import painted_config, write_checkpoint

IMAGES = sorted((Path(__file__).parents[2] / "data_tools/sample/coco_panoptic/val").glob("*.jpg"))


def small_run(folder: Path, step: int = 3) -> str:
    """A run directory with a small real MaskFormer of random weights that keeps every query."""
    config = painted_config(eval__short_side=64, eval__object_threshold=0.0, eval__overlap_threshold=0.0)
    config.model.backbone = replace(config.model.backbone, name="resnet18", weights="none")
    config.model.pixel_decoder = replace(config.model.pixel_decoder, width=16, mask_channels=16)
    config.model.decoder = replace(config.model.decoder, layers=1, queries=9, width=16, heads=2, feedforward=16)
    directory = RunDir(folder)
    model = build_model(config.model, 4, seed=0)
    assert isinstance(model, MaskFormer)
    assert isinstance(model.heads.class_head, ClassHead)
    torch.nn.init.constant_(model.heads.class_head.bias[-1:], -20.0)  # no query says no-object
    write_checkpoint(directory, config, model, step)
    return str(directory.path)


def predicted(
    inputs: list[Any], run: str, out: Path, task: str = "panoptic", share: Share | None = None, **options: Any
) -> int:
    """The exit code of a prediction."""
    return predict_images(list(map(str, inputs)), run, str(out), Options(task, **options), share=share or Share())


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    """A plain tar."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a prediction but its plan, which names the run and the input."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "predict.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
