"""The real command and the real loop on a GPU: it trains, saves, stops, resumes to the same bits, and hardly waits."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.program import SMALL, Run
from tests.integration.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
EXACT = Path(__file__).parents[1] / "integration/exact_ranks.py"
WAITS = Path(__file__).with_name("loop_waits.py")
# A backbone of few layers: cuDNN looks at every new convolution for a while, and a step is as long as its launches.
ON_GPU = ["model.backbone.name=resnet10t", "train.precision=bf16", "train.micro_batch=2", "tracking.wandb=disabled"]
REPEATABLE = [*ON_GPU, "train.deterministic=true"]
STEPS = 24
"""Enough for a signal to meet the run on its way."""
RANDOM = ["model.backbone.drop_path=0.3", "model.backbone.freeze_norm=false", "model.decoder.dropout=0.2"]


def digests(run: Path, step: int) -> dict[str, str]:
    """sha256 of a checkpoint's tensor files."""
    files = json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())["files"]
    return {name: about["sha256"] for name, about in files.items() if name.endswith(".safetensors")}


def test_a_stopped_command_resumes_to_the_same_bits(tmp_path: Path, packed: Path) -> None:
    """`mf-scale train` at the default ZeRO stage, with loader workers and asynchronous saves, stopped by a signal."""
    whole, parts = Run(tmp_path / "whole", packed), Run(tmp_path / "parts", packed)
    steps = [*REPEATABLE, *RANDOM, f"train.steps={STEPS}"]
    done = whole.train(*steps, processes=1)
    assert done.returncode == 0, done.stderr
    assert "1 x cuda" in done.stderr
    assert parts.train_until(5, signal.SIGTERM, *steps, processes=1) == 85
    stopped = max(r["step"] for r in parts.records() if r["event"] == "stop")
    assert 5 <= stopped < STEPS
    assert digests(parts.folder, stopped)
    done = parts.train(*steps, processes=1)
    assert done.returncode == 0, done.stderr
    assert f"at step {stopped}" in done.stderr
    assert parts.series("step", "loss") == whole.series("step", "loss")
    assert digests(parts.folder, STEPS) == digests(whole.folder, STEPS)
    saves = [r for r in whole.records() if r["event"] == "save"]
    assert [r["step"] for r in saves] == list(range(4, STEPS + 1, 4))
    assert not [r for r in whole.records() if r["event"] in ("skipped", "save_failed")]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """WHOLE and PARTS of every stage, one after the other in one process; a signal stops PARTS after step 3."""
    folder, jobs = tmp_path_factory.mktemp("exact"), []
    for stage in range(4):
        for kind, faults in (("whole", [""]), ("parts", ["stop train.step rank=0 step=3", ""])):
            own = [f"zero.stage={stage}", "ema.decay=0.9", "train.steps=6", "data.workers=0"]
            own += [f"data.train={packed}/train", f"run_dir={folder}/{stage}-{kind}", "checkpoint.every_steps=3"]
            jobs += [([*SMALL, *REPEATABLE, *RANDOM, *own], fault) for fault in faults]
    run_ranks(EXACT, 1, folder, json.dumps(jobs), timeout=300)
    return folder


@pytest.mark.parametrize("stage", range(4))
def test_every_stage_resumes_to_the_same_bits(exact: Path, stage: int) -> None:
    whole, parts = digests(exact / f"{stage}-whole", 6), digests(exact / f"{stage}-parts", 6)
    assert whole == parts
    assert len(whole) == (2 if stage == 3 else 3)
    assert digests(exact / f"{stage}-parts", 3) == digests(exact / f"{stage}-whole", 3) != whole


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_waits_for_the_matcher_alone(tmp_path: Path, packed: Path, stage: int) -> None:
    """One copy of the costs a micro-batch: not for the loss, the norm, the outcome, the update or the next batch."""
    target, own = tmp_path / "waits.json", [f"zero.stage={stage}", "data.workers=0"]
    sources = [f"data.train={packed}/train", f"run_dir={tmp_path}/run", "checkpoint.every_steps=0", "ema.decay=0.9"]
    run_ranks(WAITS, 1, tmp_path, str(target), *SMALL, *ON_GPU, *own, *sources, timeout=150)
    told = json.loads(target.read_text())
    places = Counter(stack[0] for stack in told["stacks"])
    assert set(places) == {place for place in places if "matching/hungarian.py" in place}, told["stacks"]
    assert places.total() == told["micro_batches"], places
    # The same by CUDA's own count, which knows of waits that neither torch nor Python tells of.
    assert told["runtime"]["cudaStreamSynchronize"] == told["micro_batches"], told["runtime"]
    assert told["runtime"]["cudaEventSynchronize"] <= told["steps"]  # the outcome of the step before, long there
