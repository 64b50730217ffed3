"""docs/per-pixel-to-masks.md cut short: one model with the per-pixel loss and with mask classification."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.report.curves import LAYERS

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docs/examples/small_fcn_to_masks.yaml"
BUILDER = "model.pixel_level.builder=small_fcn:build"
SHORT = ["data.crop=[64,64]", "schedule.name=constant", "train.log_every=1", "checkpoint.every_steps=2"]
SHORT += ["checkpoint.every_minutes=0", "eval.short_side=64", "train.collective_timeout=60", "tracking.wandb=disabled"]


def _mf_scale(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "docs/examples"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mf_scale.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT, env=environment)


def _train(folder: Path, packed: Path, kind: str, *overrides: str, processes: int = 2) -> list[dict[str, Any]]:
    """The records of the training steps after a run to its end."""
    sources = [f"data.train={packed}/train", f"data.val={packed}/val", f"run_dir={folder}"]
    done = _mf_scale(
        "train", str(CONFIG), *SHORT, *sources, f"model.kind={kind}", *overrides, "--processes", str(processes)
    )
    assert done.returncode == 0, done.stderr
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["event"] == "step"]


def _terms(record: dict[str, Any]) -> set[str]:
    """The terms of the loss; what they are made of, layer by layer, is no term."""
    return {key.removeprefix("loss_") for key in record if key.startswith("loss_") and key != LAYERS}


def test_the_per_pixel_model_trains_and_is_evaluated(tmp_path: Path, packed: Path) -> None:
    run = tmp_path / "pixels"
    steps = _train(run, packed, "per_pixel", "train.steps=4", "eval.every_steps=4", "eval.loss_samples=5")
    assert _terms(steps[0]) == {"pixel"} and not {"matched", "surplus"} & steps[0].keys()
    validation = next(r for r in read_metrics(run / "metrics.jsonl") if r["event"] == "validation")
    assert _terms(validation) == {"pixel"} and validation["loss"] == validation["loss_pixel"]

    refused = _mf_scale("evaluate", str(run), "--split", "val")
    assert refused.returncode == 2 and f"say so on the command line: {BUILDER}" in refused.stderr
    done = _mf_scale("evaluate", str(run), "--split", "val", BUILDER, "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout and "PQ" not in done.stdout
    report = _mf_scale("report", str(run))
    assert report.returncode == 0 and (run / "report/loss-terms.png").is_file(), report.stderr


def test_the_same_model_with_mask_classification_trains_and_resumes(tmp_path: Path, packed: Path) -> None:
    whole = _train(tmp_path / "whole", packed, "mask_classification", "train.steps=4")
    assert _terms(whole[0]) == {"class", "focal", "dice"} and {"matched", "surplus"} <= whole[0].keys()
    _train(tmp_path / "parts", packed, "mask_classification", "train.steps=2")
    parts = _train(tmp_path / "parts", packed, "mask_classification", "train.steps=4")
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in parts] == [r[name] for r in whole], name


@pytest.mark.parametrize("kind", ["per_pixel", "mask_classification"])
def test_the_loss_does_not_depend_on_how_the_batch_is_cut(tmp_path: Path, packed: Path, kind: str) -> None:
    """4 at once, 4 accumulated one by one, and 2 ranks with 2 each; without what depends on it by its nature.

    Those are the statistics of norms that are not frozen, and dropout, which is cut away here with the classifier.
    """
    fixed = ["train.steps=2", "model.backbone.freeze_norm=true", "model.pixel_level.features=classifier.3"]
    fixed += ["train.global_batch=4", "data.workers=0", "checkpoint.every_steps=0"]
    layouts = [
        _train(tmp_path / f"{ranks}-{micro}", packed, kind, *fixed, f"train.micro_batch={micro}", processes=ranks)
        for ranks, micro in ((1, 4), (1, 1), (2, 2))
    ]
    for steps in zip(*layouts, strict=True):
        for name in ("loss", "grad_norm"):
            assert [s[name] for s in steps[1:]] == pytest.approx([steps[0][name]] * 2, rel=1e-4), name
