"""A loss that jumps, on two ranks at ZeRO-3 with an average: the run goes back, and no stop makes it forget that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mf_scale.tracking.metrics import read_metrics
from tests.integration.program import SMALL, zero
from tests.integration.ranks import run_ranks

SCRIPT = Path(__file__).with_name("exact_ranks.py")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
GUARD = ["guard.spike_factor=20", "guard.spike_window=2", "guard.spike_skip=2", "guard.spike_rollbacks=1"]
LAYOUT = [
    *zero(3),
    "ema.decay=0.9",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
    "train.steps=8",
    "tracking.wandb=disabled",
]
SPIKE = "spike loss rank=1 step=5"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """`calm` never jumps. `back` jumps at step 5, goes back to 2 and jumps again at 5, which is once too often.
    `stopped` is asked to stop when it is back at 2, goes on and finishes. `never saved` has nothing to go back to."""
    folder = tmp_path_factory.mktemp("back")
    jobs = []
    for name, faults in {
        "calm": [""],
        "back": [SPIKE],
        "stopped": [f"{SPIKE}; stop train.first rank=0 step=2", ""],
        "never saved": [SPIKE.replace("5", "3"), ""],
    }.items():
        more = ["checkpoint.every_steps=0"] if name == "never saved" else []
        sources = [f"data.train={packed}/train", f"data.val={packed}/val", f"run_dir={folder / name}"]
        jobs += [([*SMALL, *LAYOUT, *GUARD, *sources, *more], fault) for fault in faults]
    run_ranks(SCRIPT, 2, folder, json.dumps(jobs), timeout=500)
    return folder


def keys_of(folder: Path) -> dict[int, list[str]]:
    return {r["step"]: sorted(r["keys"]) for r in read_metrics(folder / "metrics.jsonl") if r["event"] == "keys"}


def state_of(folder: Path, step: int) -> dict:
    return json.loads((folder / f"checkpoints/step-{step:08d}/state.json").read_text())


def test_a_guard_that_is_on_changes_nothing_in_a_calm_run(runs: Path) -> None:
    assert state_of(runs / "calm", 8)["rollbacks"] == []
    assert len(state_of(runs / "calm", 8)["losses"]) == 2


def test_a_jump_takes_the_run_back_once_and_ends_it_the_second_time(runs: Path) -> None:
    records = read_metrics(runs / "back/metrics.jsonl")
    rollbacks = [r for r in records if r["event"] == "rollback"]
    assert [(r["spike"], r["to"], r["skipped"]) for r in rollbacks] == [(5, 2, 2)]
    assert not (runs / "back/checkpoints/step-00000008").exists()
    assert state_of(runs / "back", 2)["rollbacks"] == [{"step": 5, "to": 2, "skipped": 2}]


def test_a_stop_right_after_it_remembers(runs: Path) -> None:
    """The batches left out are those of steps 4 and 5: one before the jump and its own."""
    folder, calm = runs / "stopped", keys_of(runs / "calm")
    for step in (2, 8):
        assert state_of(folder, step)["rollbacks"] == [{"step": 5, "to": 2, "skipped": 2}]
    assert keys_of(folder) == {step: calm[step if step <= 3 else step + 2] for step in range(1, 7)} | {
        step: keys_of(folder)[step] for step in (7, 8)
    }
    assert [r["event"] for r in read_metrics(folder / "metrics.jsonl") if r["event"] in ("rollback", "stop")] == [
        "rollback",
        "stop",
        "stop",
    ]


def test_without_a_checkpoint_it_begins_anew(runs: Path) -> None:
    state = state_of(runs / "never saved", 8)
    assert state["rollbacks"] == [{"step": 3, "to": 0, "skipped": 2}]
