"""Training on LVIS's own images, in real processes: a class that nobody looked for in them is never touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_tools.__main__ import main
from mf_scale.config.load import load_config
from mf_scale.data.batch import UNKNOWN
from mf_scale.data.federated import is_federated
from mf_scale.data.loader import train_steps
from mf_scale.data.sources import open_training
from mf_scale.data.state import DataState
from mf_scale.distributed.env import World
from mf_scale.evaluation.runner import evaluate_run
from mf_scale.fragments import checkpoint_weights
from mf_scale.models.build import build_model
from tests.integration.program import Run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

LVIS = Path(__file__).parents[3] / "shared" / "data" / "lvis_val_100"
STEPS = 3


@pytest.fixture(scope="module")
def lvis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real sample, packed as train and, the same images, as val."""
    if not LVIS.is_dir():
        pytest.skip("LVIS's sample is not beside this repository")
    folder = tmp_path_factory.mktemp("lvis")
    tree = folder / "tree"
    tree.mkdir()
    (tree / "lvis_v1_val.json").symlink_to(LVIS / "lvis_val_100.json")
    (tree / "val2017").symlink_to(LVIS / "val2017")
    for name in ("train", "val"):
        said = ["pack", "lvis_v1", str(tree), str(folder / name), "--split", "val", "--workers", "1"]
        assert main(said) in (0, None)
    return folder


def test_classes_that_nobody_looked_for_keep_their_rows_to_the_bit(tmp_path: Path, lvis: Path) -> None:
    run = Run(tmp_path / "run", lvis)
    said = ["data.task=instance", f"train.steps={STEPS}", "optimizer.weight_decay=0", "eval.instance_top_k=20"]
    done = run.train(*said, processes=2)
    assert done.returncode == 0, done.stderr

    config = load_config(run.folder / "config.yaml")
    sources = open_training(config.data)
    assert is_federated(sources[0]) and len(sources[0].vocabulary) == 1203
    order = DataState.from_dict(run.state(STEPS)["data"])
    steps = train_steps(sources, order, config.data, rank=0, world=1, step=0)
    known, marked = torch.zeros(1203, dtype=torch.bool), torch.zeros(1203, dtype=torch.bool)
    for _ in range(STEPS):
        _, batch = next(steps)
        assert batch.class_mask is not None
        known |= (batch.class_mask != UNKNOWN).any(0)
        marked[batch.labels[batch.labels >= 0]] = True
    steps.close()
    assert marked.sum() > 20 and 0.9 > known.float().mean() > marked.float().mean() and not (marked & ~known).any()

    trained = checkpoint_weights(run.folder / f"checkpoints/step-{STEPS:08d}", "raw")
    first = build_model(config.model, 1203, seed=config.seed).state_dict()
    (name,) = [name for name, value in trained.items() if value.shape == (1204,)]
    for own in (name, name.replace("bias", "weight")):
        changed = (trained[own] != first[own]).reshape(1204, -1).any(1)
        assert not changed[:-1][~known].any(), "no gradient, and so no step of the optimizer"
        assert changed[:-1][known].all() and changed[-1], "whatever was looked for has one, and no-object"

    # judged as LVIS does, the same from two processes as from one
    results = []
    for processes in (2, 1):
        (run.folder / "report" / "evaluation-val.json").unlink(missing_ok=True)
        if processes == 2:
            done = run.evaluate(processes=2)
            assert done.returncode == 0, done.stderr
        else:
            evaluate_run(str(run.folder), [], World(), split="val")
        results.append(json.loads((run.folder / "report" / "evaluation-val.json").read_text()))
    two, one = results
    assert two["instances"] == one["instances"] and one["instances"]["federated"] and two["bands"] == one["bands"]
    assert one["bands"]["rare"]["classes"] == 337 and one["instances"]["AP"] >= 0
