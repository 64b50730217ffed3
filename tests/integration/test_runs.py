"""What a run does besides surviving: validation, starting from weights, bf16, a changed batch, a quiet log."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.program import Run

pytestmark = pytest.mark.integration

# Dropout draws for a whole micro-batch, so layouts with other micro-batches are compared without it.
FIRST = ["train.steps=4", "eval.every_steps=2", "eval.loss_samples=5", "model.decoder.dropout=0"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> tuple[Run, str]:
    """A short run of two ranks with a validation, and what it printed."""
    run = Run(tmp_path_factory.mktemp("runs") / "first", packed)
    done = run.train(*FIRST)
    assert done.returncode == 0, done.stderr
    return run, done.stdout + done.stderr


def test_validation_loss_does_not_depend_on_the_layout(first, tmp_path, packed):
    """Five samples on two ranks and on one, in micro-batches of one and two: 1e-4 is float order."""
    run = Run(tmp_path / "one", packed)
    done = run.train(*FIRST, "train.micro_batch=2", processes=1)
    assert done.returncode == 0, done.stderr
    wanted, found = first[0].series("validation", "loss"), run.series("validation", "loss")
    assert list(wanted) == list(found) == [2, 4]
    assert all(abs(found[step] - wanted[step]) < 1e-4 * wanted[step] for step in wanted)
    assert set(run.series("validation", "undecodable").values()) == {0}


def test_a_validation_that_was_missed_is_made_up_for(tmp_path, packed):
    run = Run(tmp_path / "late", packed)
    assert run.train("train.steps=2", "data.val=null", "eval.every_steps=2", processes=1).returncode == 0
    assert run.series("validation", "loss") == {}
    for _ in range(2):
        assert run.train("train.steps=2", "eval.every_steps=2", "eval.loss_samples=2", processes=1).returncode == 0
        assert list(run.series("validation", "loss")) == [2]


def test_init_from_takes_the_weights_and_nothing_else(first, tmp_path, packed):
    run = Run(tmp_path / "tuned", packed)
    done = run.train("train.steps=1", f"train.init_from={first[0].folder}", processes=1)
    assert done.returncode == 0, done.stderr
    start = run.records()[0]
    assert (start["event"], start["step"], start["resumed"]) == ("start", 0, False)
    assert run.state(1)["updates"] == 1
    fresh, tuned = first[0].series("step", "loss")[1], run.series("step", "loss")[1]
    assert tuned < fresh


def test_bf16_follows_fp32(first, tmp_path, packed):
    """bf16 has 8 bits of mantissa: losses of the first steps stay within 3 %."""
    run = Run(tmp_path / "bf16", packed)
    done = run.train(*FIRST, "train.precision=bf16", "zero.stage=1")
    assert done.returncode == 0, done.stderr
    wanted, found = first[0].series("step", "loss"), run.series("step", "loss")
    assert all(abs(found[step] - wanted[step]) < 0.03 * wanted[step] for step in wanted)
    assert found != wanted


def test_another_global_batch_goes_on_at_the_next_epoch_and_says_so(first, tmp_path, packed):
    run = Run(tmp_path / "grown", packed)
    assert run.train("train.steps=4", processes=1).returncode == 0
    done = run.train("train.steps=9", "train.global_batch=8", processes=1)
    assert done.returncode == 0, done.stderr
    assert "24 samples of the one before stay unread" in done.stderr
    keys = run.series("keys", "keys")
    assert [len(keys[step]) for step in range(1, 10)] == [4] * 4 + [8] * 5
    assert len({key for step in range(5, 10) for key in keys[step]}) == 40


def test_the_log_is_quiet(first):
    lines = first[1].splitlines()
    noise = [line for line in lines if any(word in line for word in ("[INFO]", "WARNING", "Warning", "DeepSpeed info"))]
    assert not noise
    assert len(lines) < 25, first[1]
