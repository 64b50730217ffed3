"""Train 2n steps = train n, stop, resume, train n: bit for bit, at every stage, with everything random switched on.

Dropout, stochastic depth, augmentation, batch norm that learns its statistics, the moving average, and generators of
torch, numpy and Python that a resumed process finds in another state.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from mf_scale.tracking.metrics import read_metrics
from tests.integration.program import SMALL, zero
from tests.integration.ranks import run_ranks

SCRIPT = Path(__file__).with_name("exact_ranks.py")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
LAYOUTS = list(product((0, 1, 2, 3), ("fp32", "bf16")))
RANDOM = [
    "model.backbone.drop_path=0.3",
    "model.backbone.freeze_norm=false",
    "model.decoder.dropout=0.2",
    "ema.decay=0.9",
    "checkpoint.every_steps=3",
    "train.steps=6",
    "tracking.wandb=disabled",
]


def overrides(folder: Path, packed: Path, stage: int, precision: str) -> list[str]:
    layout = [*zero(stage), f"train.precision={precision}", f"train.micro_batch={1 + stage % 2}"]
    return [*SMALL, *RANDOM, *layout, f"data.train={packed}/train", f"run_dir={folder}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """WHOLE and PARTS of every layout, by two ranks; a signal to the second one stops PARTS after step 3."""
    folder = tmp_path_factory.mktemp("exact")
    jobs = []
    for stage, precision in LAYOUTS:
        whole, parts = (folder / f"{stage}-{precision}-{kind}" for kind in ("whole", "parts"))
        jobs += [(overrides(whole, packed, stage, precision), "")]
        jobs += [(overrides(parts, packed, stage, precision), "stop train.step rank=1 step=3")]
        jobs += [(overrides(parts, packed, stage, precision), "")]
    run_ranks(SCRIPT, 2, folder, json.dumps(jobs), timeout=900)
    return folder


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_a_resumed_run_is_the_undisturbed_one(runs: Path, stage: int, precision: str) -> None:
    whole, parts = (runs / f"{stage}-{precision}-{kind}" for kind in ("whole", "parts"))
    digests = [
        json.loads((run / "checkpoints/step-00000006/manifest.json").read_text())["files"] for run in (whole, parts)
    ]
    tensors = {name for name in digests[0] if name.endswith(".safetensors")}
    assert len(tensors) == (3 if stage == 3 else 4)
    assert {name: digests[0][name]["sha256"] for name in tensors} == {n: digests[1][n]["sha256"] for n in tensors}
    states = [json.loads((run / "checkpoints/step-00000006/state.json").read_text()) for run in (whole, parts)]
    assert {**states[0], "wandb_id": None} == {**states[1], "wandb_id": None}


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_metrics_and_samples_go_on_as_if_nothing_had_happened(runs: Path, stage: int, precision: str) -> None:
    told = []
    for kind in ("whole", "parts"):
        records = read_metrics(runs / f"{stage}-{precision}-{kind}/metrics.jsonl")
        steps = {r["step"]: (r["loss"], r["grad_norm"], r["lr"], r["updates"]) for r in records if r["event"] == "step"}
        told.append((steps, {r["step"]: r["keys"] for r in records if r["event"] == "keys"}))
    assert told[0] == told[1]
    assert list(told[0][0]) == [1, 2, 3, 4, 5, 6]
    stops = [r for r in records if r["event"] == "stop"]
    assert [(r["step"], r["reason"]) for r in stops] == [(3, "asked through another rank"), (6, "done")]
