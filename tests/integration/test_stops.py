"""A request to stop in every phase of a run: each time the state is committed, and the history goes on unbroken.

`make soak` asks 20 random times more.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mf_scale.tracking.metrics import read_metrics
from tests.integration.program import SMALL, zero
from tests.integration.ranks import run_ranks

SCRIPT = Path(__file__).with_name("exact_ranks.py")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
STEPS = 8
PHASES = (
    "stop start rank=1",
    "stop start rank=0; stop train.first rank=1",
    "stop train.first rank=1",
    "stop train.forward rank=0 step=2",
    "stop train.step rank=1 step=3",
    "stop train.validation rank=1 step=4",
    "stop save.snapshot rank=0 step=4",
    "stop save.part rank=1 step=4",
    "stop save.written rank=0 step=4",
    "stop save.manifest rank=0 step=4",
    "stop save.retain rank=0 step=6",
    "stop train.step rank=0 step=5; stop train.step rank=1 step=5; stop save.snapshot rank=1 step=5",
)
"""The last one asks three times, the third one while the first is being obeyed."""


def overrides(folder: Path, packed: Path, *more: str) -> list[str]:
    fixed = [f"train.steps={STEPS}", "eval.every_steps=4", "eval.loss_samples=6", "tracking.wandb=disabled"]
    fixed += ["checkpoint.every_steps=2", "checkpoint.keep_last=2"]
    return [*SMALL, *fixed, f"data.train={packed}/train", f"data.val={packed}/val", f"run_dir={folder}", *more]


def history(folder: Path) -> dict[str, dict[int, Any]]:
    """Losses, samples and validations by step; fails where a step stands twice."""
    records = read_metrics(folder / "metrics.jsonl")
    told = {"step": "loss", "keys": "keys", "validation": "loss"}
    pairs = {event: [(r["step"], r[value]) for r in records if r["event"] == event] for event, value in told.items()}
    for event, found in pairs.items():
        assert len(dict(found)) == len(found), (event, found)
    return {event: dict(found) for event, found in pairs.items()}


def stop_and_go_on(folder: Path, packed: Path, faults: list[str], *more: str) -> None:
    """An undisturbed run and, for each fault, one that is stopped by it and goes on; one start of two ranks."""
    jobs: list[tuple[list[str], str]] = [(overrides(folder / "whole", packed, *more), "")]
    for number, fault in enumerate(faults):
        run = overrides(folder / str(number), packed, *more)
        jobs += [(run, fault), (run, "")]
    run_ranks(SCRIPT, 2, folder, json.dumps(jobs), timeout=1000)


def assert_stopped_once_and_whole(folder: Path, whole: Path) -> None:
    stops = [r for r in read_metrics(folder / "metrics.jsonl") if r["event"] == "stop"]
    assert [r["reason"] for r in stops][-1] == "done"
    assert {r["reason"] for r in stops[:-1]} <= {"SIGTERM", "asked through another rank"}
    assert history(folder) == history(whole)
    for file in ("weights.safetensors", "partition-00000-of-00002.safetensors", "partition-00001-of-00002.safetensors"):
        name = f"checkpoints/step-{STEPS:08d}/{file}"
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    folder = tmp_path_factory.mktemp("stops")
    stop_and_go_on(folder, packed, list(PHASES))
    return folder


@pytest.mark.parametrize("number", range(len(PHASES)), ids=PHASES)
def test_a_stop_in_any_phase_loses_nothing(runs: Path, number: int) -> None:
    stops = [r for r in read_metrics(runs / str(number) / "metrics.jsonl") if r["event"] == "stop"]
    early = PHASES[number].startswith("stop start")  # nothing had been begun yet
    assert len(stops) == (1 if early else 2), "the order to stop was not heard"
    assert_stopped_once_and_whole(runs / str(number), runs / "whole")


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_stops_at_random(tmp_path: Path, packed: Path, request: pytest.FixtureRequest) -> None:
    chance = random.Random(1)
    points = ("train.forward", "train.step", "train.validation", "save.snapshot", "save.part", "save.written")
    faults = []
    for _ in range(request.config.getoption("--faults")):
        point = chance.choice(points)
        step = chance.randrange(1, STEPS) if point in ("train.forward", "train.step") else 4
        faults.append(f"stop {point} rank={chance.randrange(2)} step={step}")
    more = [*zero(chance.choice((0, 1, 2, 3))), f"data.workers={chance.choice((0, 1, 2))}"]
    stop_and_go_on(tmp_path, packed, faults, *more)
    for number, fault in enumerate(faults):
        print(number, fault, more)
        assert_stopped_once_and_whole(tmp_path / str(number), tmp_path / "whole")
