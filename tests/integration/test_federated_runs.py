"""Training on LVIS's own images, in real processes: a class that nobody looked for in them is never touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mf_scale.config.load import load_config
from mf_scale.data.batch import UNKNOWN
from mf_scale.data.federated import is_federated
from mf_scale.data.loader import train_steps
from mf_scale.data.sources import open_training
from mf_scale.data.state import DataState
from mf_scale.fragments import checkpoint_weights
from mf_scale.models.build import build_model
from tests.integration.program import ONE_THREAD, Run
from tests.recipe_samples import RECIPES, pack_sample

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STEPS = 3


@pytest.fixture(scope="module")
def lvis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 real images with 39 of the 1203 classes, packed."""
    if RECIPES["lvis_1203"].missing:
        pytest.skip("LVIS's sample is not beside this repository")
    folder = tmp_path_factory.mktemp("lvis")
    pack_sample("lvis_1203", folder)
    return folder


def test_classes_that_nobody_looked_for_keep_their_rows_to_the_bit(tmp_path: Path, lvis: Path) -> None:
    run = Run(tmp_path / "run", lvis)
    said = [
        f"data.val={lvis}/train",
        "data.task=instance",
        f"train.steps={STEPS}",
        "optimizer.weight_decay=0",
        "eval.instance_top_k=20",
    ]
    done = run.train(*said, processes=2)
    assert done.returncode == 0, done.stderr

    config = load_config(run.folder / "config.yaml")
    sources = open_training(config.data)
    assert is_federated(sources[0]) and len(sources[0].vocabulary) == 1203
    order = DataState.from_dict(run.state(STEPS)["data"])
    steps = train_steps(sources, order, config.data, rank=0, world=1, step=0)
    known, whole, marked = torch.zeros(3, 1203, dtype=torch.bool)
    for _ in range(STEPS):
        _, batch = next(steps)
        assert batch.class_mask is not None
        known |= (batch.class_mask != UNKNOWN).any(0)
        whole |= (batch.class_mask == 0).any(0)
        marked[batch.labels[batch.labels >= 0]] = True
    steps.close()
    assert marked.sum() > 20 and 0.9 > known.float().mean() > marked.float().mean() and not (marked & ~known).any()

    trained = checkpoint_weights(run.folder / f"checkpoints/step-{STEPS:08d}", "raw")
    first = build_model(config.model, 1203, seed=config.seed).state_dict()
    (name,) = [name for name, value in trained.items() if value.shape == (1204,)]
    for own in (name, name.replace("bias", "weight")):
        changed = (trained[own] != first[own]).reshape(1204, -1).any(1)
        assert not changed[:-1][~known].any(), "no gradient, and so no step of the optimizer"
        assert changed[:-1][whole].all() and changed[-1], "whatever was looked for has one, and no-object"

    # judged as LVIS does, and the same by two processes as by one
    results = []
    for processes in (1, 2):
        words = [sys.executable, "-m", "mf_scale.cli", "evaluate", str(run.folder), "--processes", str(processes)]
        there = {**os.environ, **ONE_THREAD}
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=there)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((run.folder / "report" / "evaluation-val.json").read_text()))
    one, two = results
    assert one["instances"] == two["instances"] and one["instances"]["federated"] and one["bands"] == two["bands"]
    assert one["bands"]["rare"]["classes"] == 337 and one["AP"] is not None
    assert sum(value is not None for value in one["instances"]["per_class"]["AP"]) == 39
