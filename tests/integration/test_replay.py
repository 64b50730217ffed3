"""Steps without an update, and what a person does next: the report, the replay, going back from a spike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mf_scale.cli import main
from mf_scale.faults import VARIABLE
from tests.integration.program import Run

pytestmark = pytest.mark.integration

POISON = "nan loss rank=1 step=6"
"""The loss of rank 1 in step 6, behind the checkpoint of step 4."""

SCHEDULE = ["schedule.name=step", "schedule.milestones=[1,4]", "schedule.gamma=0.5"]
"""Changes the rate before step 3 and before step 7 and does not depend on the length of the run."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Run:
    """Seven steps of two ranks with two micro-batches each and dropout; the sixth had no update."""
    run = Run(tmp_path_factory.mktemp("replay") / "poisoned", packed)
    done = run.train("train.steps=7", *SCHEDULE, MF_SCALE_FAULT=POISON)
    assert done.returncode == 0, done.stderr
    assert "step 6: the loss was not finite, rank 1: class" in done.stderr
    return run


@pytest.fixture
def replay(poisoned: Run, capsys: pytest.CaptureFixture[str]):
    """Replay a step of a run in this process: (exit code, what it printed)."""

    def command(step: int, *more: str, run: Path | None = None) -> tuple[int, str]:
        code = main(["replay", str(run or poisoned.folder), "--step", str(step), *more])
        said = capsys.readouterr()
        return code, said.out if code in (0, 3) else said.err

    return command


def number(text: str, row: str, column: str) -> float:
    """A number of a printed table."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(row))
    heads = next(line for line in reversed(lines[:at]) if column in line)
    return float(lines[at][heads.index(column) :].split()[0])


def test_a_bad_loss_on_one_rank_is_told_with_rank_term_groups_and_samples(poisoned):
    (event,) = [r for r in poisoned.records() if r["event"] == "skipped"]
    keys = poisoned.series("keys", "keys")[6]
    assert (event["step"], event["in_a_row"], event["reason"]) == (6, 1, "loss")
    assert event["groups"] == ["backbone", "rest", "rest/no_decay"], "its norms are frozen"
    told = [(entry["rank"], entry["micro_batch"], entry["terms"], entry["keys"]) for entry in event["ranks"]]
    assert told == [(1, 0, ["class"], keys[2:3]), (1, 1, ["class"], keys[3:4])], "gathered rank by rank"
    assert poisoned.state(7)["updates"] == 6 and poisoned.state(7)["skipped"] == [6]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Of the run; W&B's service may still be writing its own log."""
    return {
        str(f): (f.stat().st_size, f.stat().st_mtime_ns)
        for f in folder.rglob("*")
        if f.is_file() and "wandb" not in f.parts
    }


def test_a_replay_finds_the_same_micro_batches_and_changes_nothing(poisoned, replay, monkeypatch):
    before = files(poisoned.folder)
    monkeypatch.setenv(VARIABLE, POISON)
    code, text = replay(6)
    assert code == 3, text
    assert files(poisoned.folder) == before
    keys = poisoned.series("keys", "keys")[6]
    rows = [line.split() for line in text.splitlines() if line[:1] in "01" and line[1:2] == " "]
    assert [(row[0], row[1], row[-2], row[-1]) for row in rows] == [
        ("0", "0", "yes", keys[0]),
        ("0", "1", "yes", keys[1]),
        ("1", "0", "NO", keys[2]),
        ("1", "1", "NO", keys[3]),
    ]
    assert "the run recorded: the loss was not finite (rank 1: class; rank 1: class)" in text
    assert "rank 1, micro-batch 0: first gradient that is NaN: MulBackward0, made in disturbed (" in text
    assert "Reproduced: 2 of 4 micro-batches" in text


def test_what_does_not_come_again_is_said_so(replay):
    code, text = replay(6)
    assert code == 0, text
    assert "step-00000004, 1 step back that --catch-up would train first" in text
    assert "Not reproduced" in text and "try --catch-up" in text


@pytest.mark.parametrize(("step", "more"), [(5, []), (1, []), (3, ["--catch-up"]), (7, ["--catch-up"])])
def test_the_loss_and_the_gradient_are_those_of_the_run(poisoned, replay, monkeypatch, step, more):
    """Batch, cut, seeds of dropout and weights are the run's: 1e-4 is float order, another seed is 1e-2 away.

    Step 5 follows a checkpoint, step 1 the first weights; before step 3 two updates are made up for, before step 7 one
    and a step without.
    """
    monkeypatch.setenv(VARIABLE, POISON)
    code, text = replay(step, *more)
    assert code == 0, text
    (line,) = [r for r in poisoned.records() if r["event"] == "step" and r["step"] == step]
    assert number(text, "all", "loss") == pytest.approx(line["loss"], rel=1e-4)
    for group, norm in line["grad_norms"].items():
        assert number(text, f"{group} ", "gradient") == pytest.approx(norm, rel=1e-3), group
    assert ("no checkpoint before this step" in text) == (step < 4)


def test_another_precision_and_a_gone_log_are_no_hindrance(poisoned, replay, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(poisoned.folder, copy, ignore=shutil.ignore_patterns("metrics.jsonl"))
    wanted, found = replay(5), replay(5, run=copy)
    assert (found[0], number(found[1], "all", "loss")) == (0, number(wanted[1], "all", "loss"))
    code, text = replay(5, "train.precision=bf16")
    assert code == 0 and ", bf16" in text
    assert number(text, "all", "loss") == pytest.approx(number(wanted[1], "all", "loss"), rel=0.03)


def test_mistakes_are_one_paragraph(poisoned, replay, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        (replay(6, run=tmp_path / "nowhere"), "no such run directory"),
        (replay(6, run=tmp_path / "empty"), "nothing here tells of step 6"),
        (replay(8), "the run has 7 steps, there is no step 8"),
        (replay(6, "train.micro_batch=2", "seed=3"), "seed, train.micro_batch would make it another batch"),
        (replay(6, f"data.train={tmp_path}/gone"), f"{tmp_path}/gone"),
        (replay(6, f"data.train={poisoned.sources[1].partition('=')[2]}"), "its index has another digest"),
    ]
    for (code, text), wanted in cases:
        paragraphs = [line for line in text.splitlines() if line.startswith("mf-scale: ")]
        assert code == 2 and len(paragraphs) == 1 and wanted in paragraphs[0], text


def test_a_dead_run_stops_with_a_report_and_its_replay_shows_why(tmp_path, packed, replay):
    """An absurd learning rate: the loss is not finite any more, whatever the batch."""
    run = Run(tmp_path / "dead", packed)
    done = run.train(
        "train.steps=40",
        "optimizer.lr=1e12",
        "optimizer.clip_norm=0",
        "guard.skipped_in_a_row=5",
        "checkpoint.every_steps=1",
        processes=1,
    )
    assert done.returncode == 3, done.stderr
    assert "5 steps in a row had no update" in done.stderr
    (file,) = (run.folder / "report").glob("dead-steps-*.json")
    report = json.loads(file.read_text())
    first = report["steps_without_update"][0]
    assert report["checkpoint_before"] == f"step-{first - 1:08d}" and str(file) in done.stderr
    assert [e["step"] for e in report["skipped"]] == list(range(first, first + 5))
    newest = max(f.name for f in (run.folder / "checkpoints").iterdir())
    assert newest == report["checkpoint_before"], "nothing was committed in a dead row"
    assert report["replay"].endswith(f"{run.folder} --step {first}") and report["replay"] in done.stderr
    code, text = replay(first, run=run.folder)
    assert code == 3 and "first output that is not finite: " in text, text


def test_a_spike_takes_the_run_back_and_leaves_out_its_batches(poisoned, tmp_path, packed, replay):
    """Any rise of the loss is a spike to this guard: once the run goes back, the second time it stops.

    The step it went back from is then replayed with the batch it had in its place, which no checkpoint knows.
    """
    losses, undisturbed = poisoned.series("step", "loss"), poisoned.series("keys", "keys")
    spike = next(step for step in range(2, 6) if losses[step] > 1.002 * losses[step - 1])
    run = Run(tmp_path / "spiky", packed)
    guard = ["guard.spike_factor=1.001", "guard.spike_window=1", "guard.spike_skip=2", "guard.spike_rollbacks=1"]
    done = run.train("train.steps=15", *SCHEDULE, "checkpoint.every_steps=2", *guard, processes=1)
    assert done.returncode == 3, done.stderr
    assert f"has gone back 1 time already (spikes at step {spike}); now with samples" in done.stderr
    rollback = next(r for r in run.records() if r["event"] == "rollback")
    first = max(0, spike - 2)  # one batch before the spike's own, and that one
    assert (rollback["spike"], rollback["to"], rollback["skipped"]) == (spike, first // 2 * 2, 2)
    assert sorted(rollback["keys"]) == sorted(undisturbed[spike])
    keys = run.series("keys", "keys")
    same = range(1, first + 1)
    assert [sorted(keys[step]) for step in same] == [sorted(undisturbed[step]) for step in same]
    assert sorted(keys[first + 1]) == sorted(undisturbed[first + 3])
    code, text = replay(spike, "--catch-up", run=run.folder)
    assert code == 0 and number(text, "all", "loss") == pytest.approx(run.series("step", "loss")[spike], rel=1e-4)
