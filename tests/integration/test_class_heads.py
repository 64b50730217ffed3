"""Runs with a class head by text embeddings and a long-tail loss: real processes, real DeepSpeed at ZeRO stage 3."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mf_scale.distributed.env import World
from mf_scale.evaluation.runner import evaluate_run
from mf_scale.models.class_embeddings import write_class_embeddings
from mf_scale.vocabulary import Vocabulary
from tests.integration.program import Run
from tests.unit.painted import VOCABULARY_4, painted_source
from tests.unit.test_class_embeddings import letters

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.mark.parametrize(("stage", "processes"), [(3, 2)])
def test_text_embeddings_a_long_tail_loss_and_adjusted_logits(
    tmp_path: Path, packed: Path, stage: int, processes: int
) -> None:
    """Trained, evaluated on the way, resumed and evaluated from the checkpoint alone, with the same numbers."""
    source, rows = painted_source(tmp_path / "painted"), tmp_path / "rows.safetensors"
    write_class_embeddings(rows, letters(VOCABULARY_4.names), VOCABULARY_4)
    run = Run(tmp_path / "run", packed)
    said = [f"data.train={source.source}", f"data.val={source.source}", "eval.every_steps=0", "data.task=semantic"]
    said += [f"model.class_embeddings={rows}", "loss.class_balance=seesaw", "eval.logit_adjustment=0.5"]
    said += [f"zero.stage={stage}", "model.backbone.name=resnet10t", "model.decoder.layers=1"]
    for steps in (2, 4):
        done = run.train(*said, f"train.steps={steps}", "eval.metrics_every_steps=4", processes=processes)
        assert done.returncode == 0, done.stderr
    assert all(math.isfinite(loss) for loss in run.series("step", "loss").values())
    on_the_way = json.loads((run.folder / "report" / "evaluation-val.json").read_text())
    saved = Vocabulary.load(run.folder / "checkpoints" / "step-00000004" / "vocabulary.json")
    assert saved.images == source.class_counts().tolist()
    rows.unlink()
    evaluate_run(str(run.folder), [], World(), split="val")
    alone = json.loads((run.folder / "report" / "evaluation-val.json").read_text())
    assert alone["mIoU"] == on_the_way["mIoU"]
