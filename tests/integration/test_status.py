"""The state of a real run that was stopped, killed and resumed: exactly what was lost, in its files and on the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.program import Run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
LAYOUT = ["train.steps=14", "train.log_every=3", "checkpoint.asynchronous=false", "tracking.wandb=disabled",
          "data.val=null"]  # fmt: skip


def status(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "mf_scale.cli", "status", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def told(folder: Path) -> dict[str, Any]:
    return json.loads(status(folder, "--json"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Run:
    """Stopped after step 6, killed after step 11 with a checkpoint of step 8 and a line of step 9, run to its end.

    After every start what `status` said is kept beside the run.
    """
    run = Run(tmp_path_factory.mktemp("status") / "run", packed)
    faults = [("stop train.step step=6", 85), ("kill train.step step=11", -9), ("", 0)]
    for number, (fault, code) in enumerate(faults):
        done = run.train(
            *LAYOUT,
            processes=1,
            MF_SCALE_FAULT=fault,
            SLURM_JOB_ID="4711",
            SLURM_RESTART_COUNT=str(number),
        )
        assert done.returncode == code, done.stderr
        (run.folder.parent / f"status-{number}.json").write_text(status(run.folder, "--json"))
    return run


def after(run: Run, number: int) -> dict[str, Any]:
    return json.loads((run.folder.parent / f"status-{number}.json").read_text())


def test_after_the_stop(run: Run) -> None:
    state = after(run, 0)
    assert state["state"]["word"] == "stopped" and "SIGTERM" in state["state"]["sentence"]
    assert (state["step"], state["steps"], state["checkpoint"]["step"], state["unsaved_steps"]) == (6, 14, 6, 0)


def test_after_the_kill(run: Run) -> None:
    state = after(run, 1)
    assert state["state"]["word"] == "silent", "its process is gone, and it left no word"
    assert (state["step"], state["checkpoint"]["step"], state["unsaved_steps"]) == (11, 8, 3)
    assert state["starts"][1]["from_step"] == 6


def test_at_the_end(run: Run) -> None:
    state = told(run.folder)
    assert state["state"]["word"] == "done"
    names = ("number", "job", "restart", "from_step", "reached", "end", "lost_steps")
    starts = [tuple(one[name] for name in names) for one in state["starts"]]
    assert starts == [
        (1, "4711", 0, 0, 6, "stopped", 0),
        (2, "4711", 1, 6, 11, "silent", 3),
        (3, "4711", 2, 8, 14, "done", None),
    ]
    assert (state["restarts"], state["lost_steps"], state["lost_images"]) == (2, 3, 12)
    assert 0 < state["lost_seconds"] < 60 and 0 < state["starts"][1]["down_seconds"] < 120
    page = status(run.folder)
    assert "3 steps, 12 images" in page and "6 → 11" in page


def test_the_start_events_say_it_too(run: Run) -> None:
    events = [r for r in run.records() if r["event"] == "start"]
    assert [r["after"] if r["after"] is None else (r["after"]["end"], r["after"]["reached"], r["after"]["lost_steps"])
            for r in events] == [None, ("stopped", 6, 0), ("silent", 11, 3)]  # fmt: skip
    assert events[1]["after"]["reason"] == "SIGTERM"
    assert all(0 < r["after"]["seconds_down"] < 120 for r in events[1:])
    assert [(r["job"], r["restart"]) for r in events] == [("4711", 0), ("4711", 1), ("4711", 2)]
    assert all(len(r["hosts"]) == 1 for r in events)
    stops = [(r["reason"], r["exit_code"]) for r in run.records() if r["event"] == "stop"]
    assert stops == [("SIGTERM", 85), ("done", 0)]


def test_an_error_leaves_its_word(tmp_path: Path, packed: Path) -> None:
    run = Run(tmp_path / "bad", packed)
    done = run.train(*LAYOUT, "guard.skipped_in_a_row=2", processes=1, MF_SCALE_FAULT="nan loss")
    assert done.returncode == 3, done.stderr
    stop = [r for r in run.records() if r["event"] == "stop"][-1]
    assert stop["exit_code"] == 3 and "in a row" in stop["reason"]
    state = told(run.folder)["state"]
    assert state["word"] == "guard" and "in a row" in state["sentence"]
