"""What a training looks at on its way, on two ranks: evaluations, stragglers, phases, a profile. It changes nothing."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mf_scale.tracking.metrics import read_metrics
from tests.integration.program import SMALL, zero
from tests.integration.ranks import run_ranks

SCRIPT = Path(__file__).with_name("looks_ranks.py")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
STEPS = 6
RANDOM = ["model.backbone.drop_path=0.3", "model.backbone.freeze_norm=false", "model.decoder.dropout=0.2"]
FIXED = [*RANDOM, f"train.steps={STEPS}", "checkpoint.every_steps=3", "data.workers=0", "tracking.wandb=disabled"]
FIXED += ["eval.short_side=64", "eval.max_side=96"]
LOOKED = ["eval.metrics_every_steps=3", "eval.metrics_samples=3"]
WATCHED = ["train.straggler_every=3", "train.profile=[2,2]", "train.profile_ranks=[1]"]
SLOW = "slow train.forward rank=1 step=4; slow train.forward rank=1 step=5"
LATE = "slow train.step rank=0 step=1; slow train.step rank=0 step=2"
"""Seconds between two steps are told of the later one."""
JOBS: dict[str, tuple[list[str], list[str]]] = {
    "plain": (["ema.decay=0.9", "eval.metrics_every_steps=0"], [""]),
    "looked": (["ema.decay=0.9", *LOOKED, *WATCHED], [SLOW]),
    "stopped": (
        ["ema.decay=0.9", *LOOKED],
        ["stop evaluation.image rank=1 step=3", "stop evaluation.image step=6", ""],
    ),
    "gathered": ([*zero(3), "ema.decay=0.9", *LOOKED, "train.straggler_every=3"], [LATE]),
    "raw": (["zero.stage=0", *LOOKED, "eval.metrics_every_steps=6", "checkpoint.every_steps=0"], [""]),
}
"""Overrides and the fault of each start. No save makes the ranks' statistics alike before "raw" is evaluated."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """All of JOBS in one start of two ranks, and in numbers.json what `evaluate` says of their last checkpoints."""
    folder = tmp_path_factory.mktemp("looks")
    jobs = []
    for name, (own, faults) in JOBS.items():
        sources = [f"data.train={packed}/train", f"data.val={packed}/val", f"run_dir={folder / name}"]
        jobs += [([*SMALL, *FIXED, *sources, *own], fault) for fault in faults]
    looked = [str(folder / name / f"checkpoints/step-{STEPS:08d}") for name in JOBS if name != "plain"]
    run_ranks(SCRIPT, 2, folder, json.dumps(jobs), json.dumps(looked), str(folder / "numbers.json"), timeout=400)
    return folder


def records(run: Path, event: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run / "metrics.jsonl") if r["event"] == event]


def digests(run: Path) -> dict[str, str]:
    files = json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())["files"]
    return {name: about["sha256"] for name, about in files.items() if name.endswith(".safetensors")}


def test_an_evaluation_changes_no_bit_of_the_training_nor_does_a_stop_in_it(runs: Path) -> None:
    plain = digests(runs / "plain")
    assert len(plain) == 4  # weights, average, a part of each rank
    losses = [(r["step"], r["loss"], r["grad_norm"]) for r in records(runs / "plain", "step")]
    assert len(losses) == STEPS
    for name in ("looked", "stopped"):
        assert digests(runs / name) == plain, name
        assert [(r["step"], r["loss"], r["grad_norm"]) for r in records(runs / name, "step")] == losses, name
    assert not records(runs / "plain", "evaluation")
    assert not (runs / "plain/profile").exists()


@pytest.mark.parametrize("name", [name for name in JOBS if name != "plain"])
def test_the_numbers_are_those_of_the_checkpoint_of_the_step(runs: Path, name: str) -> None:
    """At every stage, of the average or the raw weights, with rank 0's statistics; each step once, stopped or not."""
    found = records(runs / name, "evaluation")
    assert [r["step"] for r in found] == ([6] if name == "raw" else [3, 6])
    assert {r["where"] for r in found} == {"training"}
    assert not records(runs / name, "evaluation_failed")
    checkpoint = str(runs / name / f"checkpoints/step-{STEPS:08d}")
    expected = json.loads((runs / "numbers.json").read_text())[checkpoint]
    assert expected["mIoU"] is not None and expected["PQ"] is not None
    for number in ("samples", "mIoU", "PQ", "AP"):
        assert found[-1][number] == expected[number], number
    saved = json.loads((runs / name / "report/evaluation-val.json").read_text())
    assert saved["step"] == STEPS
    assert saved["semantic"] == expected["semantic"]
    assert saved["pictures"]
    state = json.loads(Path(checkpoint, "state.json").read_text())
    assert state["evaluated"] == STEPS  # else each start of the finished run would evaluate again


def test_a_stop_in_an_evaluation_is_heard_at_the_next_image(runs: Path) -> None:
    stops = records(runs / "stopped", "stop")
    assert [(r["step"], r["exit_code"]) for r in stops] == [(3, 85), (6, 85), (6, 0)]
    assert [r["step"] for r in records(runs / "stopped", "start")] == [0, 3, 6]


def test_phases_fill_the_step_and_terms_are_told_by_layer(runs: Path) -> None:
    for name in ("looked", "gathered"):
        for record in records(runs / name, "step"):
            assert list(record["phases"]) == ["data", "forward", "loss", "backward", "optimizer", "other"]
            assert sum(record["phases"].values()) == pytest.approx(record["step_time"], rel=0.02)
            assert record["images_per_second"] == pytest.approx(4 / record["step_time"])
            assert min(record["phases"].values()) >= 0
            assert record["phases"]["forward"] > 0 and record["phases"]["backward"] > 0
            assert {len(layers) for layers in record["loss_layers"].values()} == {2}
            for term in ("class", "focal", "dice"):
                assert sum(record["loss_layers"][term]) == pytest.approx(record[f"loss_{term}"], rel=1e-5)
            assert record["memory"]["device_peak_gib"] is None
            assert 0.05 < record["memory"]["host_rss_gib"] < 50
            assert record["matched"] > 0
    # Rank 1 slept for a second in the forward pass: the mean of both is half of it, and rank 0 waited in the backward.
    slow = {r["step"]: r["phases"] for r in records(runs / "looked", "step")}[4]
    assert slow["forward"] > 0.5 and slow["backward"] > 0.5


def test_the_rank_that_the_others_wait_for_is_named_with_its_phase(runs: Path) -> None:
    """Of steps 3 to 5: the first one is left out, and so is the one that is profiled."""
    (found,) = records(runs / "looked", "straggler")
    assert (found["step"], found["rank"], found["phase"]) == (5, 1, "forward")
    assert found["seconds"] > 2 / 3 and found["seconds"] > found["median"] + 0.3
    assert found["host"] == os.uname().nodename


def test_at_stage_3_a_rank_is_named_by_what_is_its_own(runs: Path) -> None:
    """Its forward pass waits for the others' weights, so that of all ranks is as long."""
    found = records(runs / "gathered", "straggler")
    assert [(r["step"], r["rank"], r["phase"]) for r in found] == [(4, 0, "other")]


def test_the_rank_and_the_steps_that_were_named_are_profiled(runs: Path) -> None:
    folder = runs / "looked/profile"
    assert sorted(file.name for file in folder.iterdir()) == ["steps-2-2-rank-1.json.gz", "steps-2-2-rank-1.txt"]
    trace = json.loads(gzip.decompress((folder / "steps-2-2-rank-1.json.gz").read_bytes()))
    told = [event.get("name") for event in trace["traceEvents"]]
    assert told.count("step 2") == 1
    assert "step 1" not in told and "step 3" not in told
    assert "aten::convolution" in told
    table = (folder / "steps-2-2-rank-1.txt").read_text()
    assert "Self CPU %" in table and "aten::" in table
