"""A run that goes back, is stopped, resumed and aborted, as metrics.jsonl and the real W&B client tell it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.wandb_values import row, rows, wandb_values
from tests.integration.program import SMALL
from tests.integration.ranks import run_ranks
from tests.unit.wandb_files import Told, segments

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
SCRIPT = Path(__file__).with_name("exact_ranks.py")
OWN = frozenset({"_step", "_runtime", "_wandb/runtime"})
"""What W&B adds to a row."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> RunDir:
    """Asked to stop at 4; goes on; at 8 the loss jumps, so it goes back to 4; at 8 once more, which is too often."""
    folder = tmp_path_factory.mktemp("tracked")
    sources = [f"data.train={packed}/train", f"data.val={packed}/val", f"run_dir={folder / 'run'}"]
    guard = ["guard.spike_factor=20", "guard.spike_window=2", "guard.spike_skip=2", "guard.spike_rollbacks=1"]
    common = [*SMALL, *sources, *guard, "checkpoint.every_steps=4", "eval.every_steps=4", "train.log_every=1"]
    jobs = [
        ([*common, "train.steps=9"], "stop train.step rank=0 step=4"),
        ([*common, "train.steps=9"], "spike loss rank=0 step=8"),
    ]
    run_ranks(SCRIPT, 1, folder, json.dumps(jobs), timeout=200)
    return RunDir(folder / "run")


@pytest.fixture(scope="module")
def live(run: RunDir) -> list[Told]:
    """What was told while the run went on, a file for each start."""
    return segments(run.wandb, (run.wandb / "run-id").read_text())


def own(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what W&B adds to it."""
    return {name: value for name, value in row.items() if name not in OWN}


def all_lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_the_file_tells_every_event_and_its_readers_what_holds(run: RunDir) -> None:
    told = [(line["event"], line["step"]) for line in all_lines(run) if line["event"] not in ("step", "keys")]
    order = ["start", "save", "stop", "start", "validation", "rollback", "start", "save", "validation", "stop"]
    assert [event for event, _ in told] == order
    lines = {event: [line for line in all_lines(run) if line["event"] == event] for event, _ in told}
    assert [start["resumed"] for start in lines["start"]] == [False, True, True]
    assert [(stop["reason"].split()[0], stop["exit_code"]) for stop in lines["stop"]] == [("SIGTERM", 85), ("the", 3)]
    assert all(set(start["code"]) == {"fingerprint", "commit"} for start in lines["start"])
    held = read_metrics(run.metrics)
    steps = [line["step"] for line in held if line["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8], "each once, in order"
    assert [line["start"] for line in held if line["event"] == "validation"] == [3], "the later one of step 4"
    twice = [line for line in all_lines(run) if line["event"] == "step" and line["step"] > 4]
    assert [line["step"] for line in twice] == [5, 6, 7, 8, 5, 6, 7, 8]
    assert [line for line in held if line["event"] == "step"][4:] == twice[4:], "the later telling holds"
    assert all(line["quarantined"] == 0 and set(line["lrs"]) == set(line["grad_norms"]) for line in twice[:2])


def test_live_every_step_is_told_once_as_the_file_told_it_first(run: RunDir, live: list[Told]) -> None:
    assert len(live) == 3
    found = [own(told) for segment in live for told in segment.rows]
    steps = [told["step"] for told in found]
    assert steps == sorted(set(steps)) == [1, 2, 3, 4, 5, 6, 7, 8], "one monotone axis over all starts, no doubles"
    first: dict[int, dict[str, Any]] = {}
    for line in all_lines(run):
        if line["event"] == "step":
            first.setdefault(line["step"], row(line, wandb_values(line)))
    assert {told["step"]: told for told in found} == first
    assert [own_step["_step"] for segment in live for own_step in segment.rows] == steps
    assert all(("*", "step") in segment.metrics for segment in live if segment.rows)


def test_live_the_end_of_each_start_is_told(run: RunDir, live: list[Told]) -> None:
    assert [segment.exit_code for segment in live] == [85, 0, 1]
    assert [segment.summary["run/state"] for segment in live] == ["stopped", "went back", "guard"]
    assert live[0].kinds.count("preempting") == 1 and "preempting" not in live[2].kinds
    (title, text, level) = live[2].alerts[-1]
    assert (title, level) == ("the run was aborted", "ERROR") and "at step 8: the loss of step 8" in text
    assert live[0].config["train"]["steps"] == 9 and len(live[0].config["code"]["fingerprint"]) == 16
    assert live[0].config["code"]["versions"]["torch"] and live[0].config["session"]["classes"] == 133


def test_wandb_sync_writes_one_clean_run_and_only_one(run: RunDir) -> None:
    command = [sys.executable, "-m", "mf_scale.cli", "wandb-sync", str(run.path), "--offline"]
    id = (run.wandb / "run-id").read_text() + "-clean"
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env={**os.environ})
        assert done.returncode == 0, done.stderr
        assert f"W&B run {id}: 8 steps, up to step 8" in done.stdout
        (clean,) = segments(run.wandb, id)
        assert f"wandb sync {clean.folder}" in done.stdout
        assert [own(told) for told in clean.rows] == list(rows(read_metrics(run.metrics)).values())
    assert Counter(told["_step"] for told in clean.rows) == Counter([1, 2, 3, 4, 5, 6, 7, 8])
    assert "validation/loss" in clean.rows[3], "made up for after the stop"
    assert (clean.summary["run/state"], clean.exit_code) == ("guard", 3)
    started = next(line for line in reversed(all_lines(run)) if line["event"] == "start")
    assert clean.config["code"] == {**started["code"], "versions": started["versions"]}
    assert len(segments(run.wandb, id.removesuffix("-clean"))) == 3, "what was told live is left alone"
