"""The main job with real processes: whatever stops a run, it goes on as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.program import LARGER, Run

pytestmark = pytest.mark.integration
STEPS = "train.steps=10"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "undisturbed", packed, LARGER)
    done = run.train(STEPS)
    assert done.returncode == 0, done.stderr
    return run


def assert_same_history(run: Run, undisturbed: Run, tolerance: float = 0.0) -> None:
    """AdamW hides the scale of gradients, so their norms are compared beside the losses."""
    for name, allowed in (("loss", tolerance), ("grad_norm", 10 * tolerance)):
        found, wanted = run.series("step", name), undisturbed.series("step", name)
        assert list(found) == list(wanted) == list(range(1, 11))
        assert all(abs(found[s] - wanted[s]) <= allowed * abs(wanted[s]) for s in wanted), (name, found, wanted)
    keys, wanted_keys = run.series("keys", "keys"), undisturbed.series("keys", "keys")
    assert {s: sorted(k) for s, k in keys.items()} == {s: sorted(k) for s, k in wanted_keys.items()}


def test_a_run_leaves_what_it_should(undisturbed: Run) -> None:
    names = {p.name for p in undisturbed.folder.iterdir()}
    assert {"config.yaml", "vocabulary.json", "metrics.jsonl", "checkpoints", "wandb"} <= names
    assert sorted(p.name for p in (undisturbed.folder / "checkpoints").iterdir()) == [
        "latest",
        "step-00000004",
        "step-00000008",
        "step-00000010",
    ]
    assert undisturbed.state(10)["updates"] == 10
    assert len({key for keys in undisturbed.series("keys", "keys").values() for key in keys}) == 40


def test_training_again_finds_nothing_to_do(undisturbed: Run) -> None:
    again = undisturbed.train(STEPS)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    assert list(undisturbed.series("step", "loss")) == list(range(1, 11))


def test_kill_9_of_everything_goes_on_from_the_last_commit(tmp_path: Path, packed: Path, undisturbed: Run) -> None:
    run = Run(tmp_path / "killed", packed, LARGER)
    assert run.train_until(6, signal.SIGKILL, STEPS, everyone=True) == -signal.SIGKILL
    done = run.train(STEPS)
    assert done.returncode == 0, done.stderr
    assert "at step 4" in done.stderr or "at step 8" in done.stderr
    assert_same_history(run, undisturbed)


def test_sigterm_to_one_rank_commits_and_resumes_elsewhere(tmp_path: Path, packed: Path, undisturbed: Run) -> None:
    """Two ranks with one worker each are stopped; one rank without workers, at another ZeRO stage, goes on."""
    run = Run(tmp_path / "stopped", packed, LARGER)
    assert run.train_until(5, signal.SIGTERM, STEPS) == 85
    stop = [r for r in run.records() if r["event"] == "stop"][-1]
    assert stop["reason"] == "SIGTERM"
    assert run.state(stop["step"])["step"] == stop["step"]
    done = run.train(STEPS, "zero.stage=1", "data.workers=0", processes=1)
    assert done.returncode == 0, done.stderr
    # One rank adds in another order than two: 1e-4 of the loss after a handful of updates, measured 1e-6.
    assert_same_history(run, undisturbed, tolerance=1e-4)


def test_a_damaged_checkpoint_is_walked_back_from(tmp_path: Path, packed: Path, undisturbed: Run) -> None:
    run = Run(tmp_path / "damaged", packed, LARGER)
    shutil.copytree(undisturbed.folder, run.folder, symlinks=True)
    weights = run.folder / "checkpoints/step-00000010/weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    done = run.train(STEPS)
    assert done.returncode == 0, done.stderr
    assert "step-00000010 is damaged" in done.stderr
    assert "at step 8" in done.stderr
    assert (run.folder / "checkpoints/step-00000010.damaged").is_dir()
    assert_same_history(run, undisturbed)


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path, packed: Path) -> None:
    """Its loader workers live on for some seconds; the same command must not find the directory taken."""
    run = Run(tmp_path / "alone", packed, LARGER)
    assert run.train_until(2, signal.SIGKILL, STEPS, processes=1) == -signal.SIGKILL
    done = run.train("train.steps=3", processes=1)
    assert done.returncode == 0, done.stderr


def test_a_stop_right_after_the_start_is_not_lost(tmp_path: Path, packed: Path) -> None:
    run = Run(tmp_path / "early", packed, LARGER)
    for delay in (0.15, 0.4):
        child = subprocess.Popen(run.command("train.steps=400"), stderr=subprocess.PIPE, text=True)
        try:
            time.sleep(delay)
            child.send_signal(signal.SIGTERM)
            _, output = child.communicate(timeout=90)
        finally:
            child.kill()
        # Before Python has installed any handler the signal's default ends the launcher, with no rank started.
        assert child.returncode in (85, -signal.SIGTERM), output
    assert run.last_step() < 3


def test_what_a_line_tells_is_written_before_a_stop(tmp_path: Path, packed: Path) -> None:
    """Lines are means over `log_every` steps; a stop in between writes the mean of the steps so far."""
    run = Run(tmp_path / "lines", packed, LARGER)
    assert run.train("train.steps=10", "train.log_every=4", "data.val=null", processes=1).returncode == 0
    assert list(run.series("step", "loss")) == [4, 8, 10]
    more = ["train.steps=400", "train.log_every=1000", "checkpoint.every_steps=0"]
    child = subprocess.Popen(run.command(*more, processes=1), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while run.series("keys", "keys").keys() <= set(range(13)) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == 85
    finally:
        child.kill()
    stop = [r for r in run.records() if r["event"] == "stop"][-1]["step"]
    assert list(run.series("step", "loss"))[-1] == stop > 12
