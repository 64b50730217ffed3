"""Killed outright at every ZeRO stage, and stopped by the clock: what goes on is the undisturbed run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.program import SMALL, Run, zero
from tests.integration.ranks import run_ranks
from tests.integration.test_stops import history

SCRIPT = Path(__file__).with_name("exact_ranks.py")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
STAGES = {0: "fp32", 1: "bf16", 2: "fp32", 3: "bf16"}
STEPS = ["train.steps=6", "checkpoint.every_steps=2", "ema.decay=0.9", "tracking.wandb=disabled"]


def layout(stage: int) -> list[str]:
    return [*STEPS, *zero(stage), f"train.precision={STAGES[stage]}"]


def run_all(folder: Path, packed: Path, names: dict[str, int]) -> None:
    """Train the runs of these names and stages to their end, by two ranks."""
    sources = [f"data.train={packed}/train", "data.val=null"]
    jobs = [([*SMALL, *layout(stage), *sources, f"run_dir={folder / name}"], "") for name, stage in names.items()]
    run_ranks(SCRIPT, 2, folder, json.dumps(jobs), timeout=500)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    for stage in STAGES:
        run = Run(folder / f"killed {stage}", packed)
        # At step 5 the write of step 4 may or may not be committed: both must do.
        killed = run.train(*layout(stage), "data.val=null", MF_SCALE_FAULT="kill train.step rank=1 step=5")
        assert killed.returncode == 137, killed.stderr
    run_all(folder, packed, {f"{kind} {stage}": stage for stage in STAGES for kind in ("whole", "killed")})
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_ends_as_the_undisturbed_one(runs: Path, stage: int) -> None:
    killed, whole = runs / f"killed {stage}", runs / f"whole {stage}"
    assert history(killed) == history(whole)
    files = [f.name for f in (whole / "checkpoints/step-00000006").glob("*.safetensors")]
    assert len(files) == (3 if stage == 3 else 4)
    for file in files:
        name = f"checkpoints/step-00000006/{file}"
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_clock_stops_a_run_before_its_job_ends(tmp_path: Path, packed: Path) -> None:
    """The job ends in 36 s, of which train.stop_before leaves 12 for the start and the steps."""
    run = Run(tmp_path / "clock", packed)
    ends: dict[str, Any] = {"SLURM_JOB_END_TIME": str(int(time.time()) + 36)}
    done = run.train("train.steps=100000", "train.stop_before=0.4", "data.val=null", processes=1, **ends)
    assert done.returncode == 85, done.stderr
    stop = [r for r in run.records() if r["event"] == "stop"][-1]
    assert stop["reason"].startswith("deadline: ")
    assert run.state(stop["step"])["step"] == stop["step"] > 0
