"""Text embeddings and all that is for long tails at once, on real images: real processes, real DeepSpeed at stage 3."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mf_scale.data.index import Index
from mf_scale.distributed.env import World
from mf_scale.evaluation.runner import evaluate_run
from mf_scale.models.class_embeddings import write_class_embeddings
from mf_scale.vocabulary import Vocabulary
from tests.integration.program import Run
from tests.unit.test_class_embeddings import letters

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TOGETHER = ["data.repeat_threshold=0.3", "loss.class_balance=seesaw", "eval.logit_adjustment=0.5", "data.task=semantic"]
SHORT = ["eval.short_side=64", "eval.max_side=96", "eval.metrics_every_steps=4", "checkpoint.every_steps=2"]


@pytest.mark.parametrize(("stage", "processes"), [(3, 2)])
def test_text_embeddings_a_long_tail_loss_and_adjusted_logits(
    tmp_path: Path, packed: Path, stage: int, processes: int
) -> None:
    """Trained and evaluated on the way; gone on with from the middle, and evaluated from the checkpoint alone: the same
    weights and numbers."""
    source, rows = Index.open(packed / "train"), tmp_path / "rows.safetensors"
    write_class_embeddings(rows, letters(source.vocabulary.names), source.vocabulary)
    run = Run(tmp_path / "run", packed)
    said = [*TOGETHER, *SHORT, f"model.class_embeddings={rows}", f"zero.stage={stage}", "train.steps=4"]
    said += ["model.backbone.name=resnet10t", "model.decoder.layers=1"]
    done = run.train(*said, processes=processes)
    assert done.returncode == 0, done.stderr
    assert all(math.isfinite(loss) for loss in run.series("step", "loss").values())
    saved = Vocabulary.load(run.folder / "checkpoints/step-00000004/vocabulary.json")
    assert saved.images == source.class_counts().tolist()
    again = Run(tmp_path / "again", packed)
    shutil.copytree(run.folder, again.folder)
    shutil.rmtree(again.folder / "checkpoints/step-00000004")
    done = again.train(*said, processes=processes)
    assert done.returncode == 0, done.stderr
    assert again.series("step", "loss") == run.series("step", "loss")
    assert again.series("keys", "keys") == run.series("keys", "keys")
    before, after = (load_file(r.folder / "checkpoints/step-00000004/weights.safetensors") for r in (run, again))
    assert list(before) == list(after) and all(torch.equal(value, after[name]) for name, value in before.items())
    rows.unlink()
    evaluate_run(str(again.folder), [], World(), split="val")
    numbers = [json.loads((r.folder / "report/evaluation-val.json").read_text()) for r in (run, again)]
    assert numbers[0]["mIoU"] == numbers[1]["mIoU"] and len(numbers[0]["class_names"]) == 133
