"""What a save that fails, hangs or finds the disk busy says, and what stays of the checkpoints meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mf_scale import faults
from mf_scale.errors import UserError
from mf_scale.training import saver as module
from mf_scale.training.saver import SLOW_SECONDS, Saver
from mf_scale.training.snapshot import FileContents
from tests.unit.test_saver import Clock, Recorder, make_session, steps, until


def save(saver: Saver, session: Any, step: int) -> None:
    session.state.step = step
    saver.save()
    saver.finish()


def test_the_best_stays_while_the_new_best_cannot_be_saved_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(tmp_path, keep_last=1)
    saver = Saver(session, Recorder())  # type: ignore[arg-type]
    session.state.step = 4
    session.state.note_validation(0.9)
    save(saver, session, 4)
    save(saver, session, 8)
    session.state.step = 12
    session.state.note_validation(0.5)
    monkeypatch.setenv(faults.VARIABLE, "full save.part step=12")
    save(saver, session, 12)
    assert steps(session) == [8, 4]
    save(saver, session, 16)
    assert session.state.best == (12, 0.5) and steps(session) == [16, 4]
    session.resumed = True
    save(Saver(session, Recorder()), session, 20)  # type: ignore[arg-type]
    assert steps(session) == [20, 4]
    session.state.step = 24
    session.state.note_validation(0.4)
    save(saver, session, 24)
    assert steps(session) == [24]


def test_nothing_is_committed_that_the_metrics_do_not_know(tmp_path: Path) -> None:
    session, recorder = make_session(tmp_path), Recorder()
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    recorder.unwritten = "metrics.jsonl cannot be written (No space left on device, 3 lines wait in memory)"
    save(saver, session, 4)
    assert steps(session) == [] and "3 lines wait" in recorder.of("save_failed")[0]["reason"]
    with pytest.raises(UserError, match=r"last checkpoint.*3 lines wait.*start the same command again"):
        saver.save_last()
    recorder.unwritten = None
    saver.save_last()
    assert steps(session) == [4]


def test_a_row_of_failures_alerts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, recorder = make_session(tmp_path), Recorder()
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    for row in (1, 2):
        monkeypatch.setenv(faults.VARIABLE, "full save.part")
        for step in range(3):
            save(saver, session, 10 * row + step)
        assert len(recorder.alerts) == row and len(recorder.of("save_failed")) == 3 * row
        assert "start the same command" not in recorder.notes[-1]
        monkeypatch.delenv(faults.VARIABLE)
        save(saver, session, 10 * row + 5)


def hanging(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The writer hangs in its first part until the event is set."""
    release = threading.Event()
    monkeypatch.setattr(faults, "time", SimpleNamespace(sleep=lambda _: release.wait(30)))
    monkeypatch.setenv(faults.VARIABLE, "hang save.part")
    return release


def test_a_write_that_hangs_behind_the_training_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, release, recorder = Clock(), hanging(monkeypatch), Recorder()
    monkeypatch.setattr(module, "time", clock)
    session = make_session(tmp_path)
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    try:
        session.state.step = 4
        saver.save()
        clock.now += SLOW_SECONDS - 1
        assert not saver.due_by_time() and not recorder.of("save_slow")
        clock.now += 2
        for _ in range(3):
            saver.due_by_time()
        (event,) = recorder.of("save_slow")
        assert (event["step"], event["ranks"]) == (4, [0])
        assert "step 4 is being written for 5 minutes on rank 0" in recorder.notes[0] and len(recorder.alerts) == 1
    finally:
        release.set()
    saver.finish()
    assert steps(session) == [4] and len(recorder.of("save_slow")) == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_write_that_the_training_waits_for_is_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    release, recorder = hanging(monkeypatch), Recorder()
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.2)
    session = make_session(tmp_path, asynchronous=asynchronous)
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    threading.Timer(1.0, release.set).start()
    save(saver, session, 4)
    assert steps(session) == [4] and len(recorder.of("save_slow")) == 1


def test_the_training_does_not_wait_for_a_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(tmp_path, keep_last=1, asynchronous=False)
    saver = Saver(session, Recorder())  # type: ignore[arg-type]
    slow, retain = threading.Event(), module.retain

    def slowly(*arguments: Any) -> Any:
        removed = retain(*arguments)
        assert slow.wait(30)
        return removed

    monkeypatch.setattr(module, "retain", slowly)
    began = time.monotonic()
    for session.state.step in (4, 8, 12):
        saver.save()
    assert time.monotonic() - began < 20 and steps(session) == [12, 8, 4]
    slow.set()
    saver.finish()
    assert steps(session) == [12], "what was put off is made up for"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_tensor_that_a_checkpoint_cannot_hold_is_refused_at_the_start(tmp_path: Path, asynchronous: bool) -> None:
    session = make_session(tmp_path, asynchronous=asynchronous)
    session.contents = lambda: [FileContents("w", {"angles": torch.zeros(2, dtype=torch.complex64)}, {})]
    with pytest.raises(UserError, match=r"cannot be saved: angles is torch\.complex64"):
        Saver(session, Recorder()).prepare()  # type: ignore[arg-type]


def test_the_ranks_that_still_write_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has written; the sum over the ranks says that rank 1 has not, twice."""
    session, recorder = make_session(tmp_path, first=True), Recorder()
    session.world = type(session.world)(0, 2, 0)
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.0)
    session.state.step = 4
    saver.save()
    until(saver.written)
    left = [1, 1]
    monkeypatch.setattr(module.comm, "sum_array", lambda mine: mine + np.array([0, left.pop() if left else 0]))
    saver.finish()
    assert recorder.of("save_slow")[0]["ranks"] == [1] and steps(session) == [4]
