"""RUN/progress: exact to the step, a slot for each start, harmless where it cannot be written or read."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mf_scale.rundir import MANIFEST, RunDir
from mf_scale.tracking.metrics import MetricsLog
from mf_scale.tracking.progress import PROGRESS, SLOT_BYTES, Progress, furthest_step, last_lines, read_progress


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def test_each_start_has_its_slot(run: RunDir) -> None:
    first, second = Progress(run, 1, 0, 0), Progress(run, 3, 4, 4)
    second.note(5, 5)
    first.note(9, 8)  # a survivor that goes on beside it
    first.close()
    second.close()
    slots = read_progress(run)
    assert set(slots) == {1, 3}
    assert (slots[1].from_step, slots[1].step, slots[1].updates) == (0, 9, 8)
    assert (slots[3].from_step, slots[3].step, slots[3].updates) == (4, 5, 5)
    assert slots[3].began <= slots[3].first <= slots[3].stepped <= slots[3].last <= time.time() + 0.001
    assert (run.path / PROGRESS).stat().st_size == 3 * SLOT_BYTES


def test_when_its_first_and_its_last_step_were_done(run: RunDir) -> None:
    progress = Progress(run, 1, 0, 0)
    progress.note(1, 1)
    time.sleep(0.02)
    progress.note(2, 2)
    time.sleep(0.02)
    progress.close()
    slot = read_progress(run)[1]
    assert slot.began <= slot.first < slot.stepped < slot.last


def test_no_step_yet(run: RunDir) -> None:
    Progress(run, 1, 7, 7)
    slot = read_progress(run)[1]
    assert (slot.step, slot.first) == (7, 0.0) and slot.last == pytest.approx(time.time(), abs=5)


def test_a_killed_process_leaves_its_last_step(run: RunDir) -> None:
    child = os.fork()
    if child == 0:
        progress = Progress(run, 1, 0, 0)
        for step in range(1, 51):
            time.sleep(0.005)
            progress.note(step, step)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert read_progress(run)[1].step == 50


def test_a_slow_file_system_does_not_hold_up_the_steps(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, writes = Progress(run, 1, 0, 0), []
    pwrite = os.pwrite

    def slow(*arguments: object) -> int:
        writes.append(arguments)
        time.sleep(0.1)
        return pwrite(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", slow)
    time.sleep(0.05)
    began = time.monotonic()
    for step in range(1, 1001):
        progress.note(step, step)
    assert len(writes) == 1 and time.monotonic() - began < 1.0
    progress.close()
    assert read_progress(run)[1].step == 1000, "the end is written"


def test_what_cannot_be_written_is_no_trouble(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Progress(RunDir(run.path / "gone"), 1, 0, 0)
    nowhere.note(1, 1)
    nowhere.close()
    nowhere.close()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    progress = Progress(run, 1, 0, 0)
    monkeypatch.setattr(os, "pwrite", full)
    for step in range(1, 10):
        progress.note(step, step)
    progress.close()
    assert read_progress(RunDir(run.path / "gone")) == {}


def test_what_cannot_be_read_is_left_out(run: RunDir) -> None:
    Progress(run, 2, 0, 0).close()
    file = run.path / PROGRESS
    whole = file.read_bytes()
    assert set(read_progress(run)) == {2}, "the first slot was never written"
    for broken in (b"", b"\0" * 300, whole[:-5], whole.replace(b"2 0 0 0", b"2 x 0 0"), b"\xff" * SLOT_BYTES):
        file.write_bytes(broken)
        assert read_progress(run) == {}


def test_the_furthest_step_by_whatever_tells_it(run: RunDir) -> None:
    assert furthest_step(run) == 0
    log = MetricsLog(run.metrics)
    log.write("step", 12, loss=1.0)
    log.close()
    assert furthest_step(run) == 12
    folder = run.checkpoint(15)
    folder.mkdir(parents=True)
    assert furthest_step(run) == 12, "a folder without manifest is no checkpoint"
    (folder / MANIFEST).write_text("{}")
    assert furthest_step(run) == 15
    Progress(run, 1, 17, 17).close()
    Progress(run, 2, 3, 3).close()
    assert furthest_step(run) == 17


def test_the_last_lines_are_found_behind_a_long_one(run: RunDir) -> None:
    log = MetricsLog(run.metrics)
    log.write("step", 1)
    log.write("keys", 2, keys=["k" * 300_000])
    log.close()
    assert [(r["event"], r["step"]) for r in last_lines(run.metrics)][-1] == ("keys", 2)
    with run.metrics.open("a") as file:
        file.write('{"event": "step", "step": 99')
    assert last_lines(run.metrics)[-1]["step"] == 2, "a torn line tells nothing"
