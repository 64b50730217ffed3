"""How a process ends: its writes finished, its last lines written, within a bounded time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mf_scale.config.schema import Config
from mf_scale.errors import StoppedOnRequest, UserError
from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import MetricsLog
from mf_scale.training import recorder as module
from mf_scale.training.fence import FencedError
from mf_scale.training.recorder import Recorder, open_recorder
from tests.unit.test_rundir import fence_of

PROGRAM = """
import sys, time
from pathlib import Path
from mf_scale import cli
from mf_scale.training.writer import Writer

def main():
    def write():
        time.sleep(float(sys.argv[2]))
        Path(sys.argv[1]).write_text("whole")
    Writer("checkpoint").start(write)
    return 85

cli.main = main
cli._WRITER_SECONDS = float(sys.argv[3])
cli.run()
"""


@pytest.mark.parametrize("seconds, patience, whole", [(0.5, 60.0, True), (3600.0, 0.3, False)])
def test_a_process_that_ends_waits_for_its_writer_but_not_for_ever(
    tmp_path: Path, seconds: float, patience: float, whole: bool
) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "file"), str(seconds), str(patience)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 85, done.stderr
    assert (tmp_path / "file").exists() == whole
    assert ("not waiting any longer for what still runs behind: checkpoint" in done.stderr) != whole
    assert time.monotonic() - began < 50


class Log:
    """A metrics.jsonl whose disk is full."""

    closed = 0

    def flush(self) -> str:
        return "metrics.jsonl cannot be written (No space left on device, 2 lines wait in memory)"

    def close(self) -> str:
        self.closed += 1
        return "2 lines of metrics.jsonl are lost (No space left on device)"


@pytest.mark.parametrize("ends", [None, StoppedOnRequest(), KeyError("a fault")])
def test_a_run_that_ends_with_lines_that_wait_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: Exception | None
) -> None:
    log, notes = Log(), []
    config = SimpleNamespace(train=SimpleNamespace(steps=1), tracking=None)
    fence = SimpleNamespace(check=lambda: None)
    run, world = SimpleNamespace(path=tmp_path), SimpleNamespace(first=True)
    session = SimpleNamespace(config=config, run=run, world=world, fence=fence, start=1)
    monkeypatch.setattr(module, "_announce", lambda *_: None)
    monkeypatch.setattr(module, "_shown_settings", lambda _: {})
    monkeypatch.setattr(module, "MetricsLog", lambda *_, **__: log)
    monkeypatch.setattr(module, "WandbRun", lambda *_: SimpleNamespace(finish=lambda *_, **__: None))
    monkeypatch.setattr(Recorder, "note", lambda _, text: notes.append(text))
    session.run.metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(type(ends) if ends else UserError) as caught, open_recorder(session):  # type: ignore[arg-type]
        if ends is not None:
            raise ends
    if ends is None:
        assert "the last lines of metrics.jsonl cannot be written" in str(caught.value)
    assert notes == ["2 lines of metrics.jsonl are lost (No space left on device)"] and log.closed == 1


class Wandb:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def record(self, record: dict[str, object]) -> None:
        self.told.append(f"step {record['step']}")

    def alert(self, title: str, text: str, level: str) -> None:
        self.told.append(title)

    def abandon(self) -> None:
        self.told.append("abandoned")

    def finish(self, exit_code: int, *, preempting: bool) -> None:
        self.told.append(f"finished {exit_code}")


def test_a_start_that_was_cut_off_tells_nothing_to_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECK_SECONDS", 0.0)
    run, wandb = RunDir(tmp_path), Wandb()
    session = SimpleNamespace(
        config=Config(), run=run, fence=fence_of(run), start=1, state=SimpleNamespace(step=3, updates=3)
    )
    log = MetricsLog(run.metrics, start=1, check=session.fence.check)
    recorder = Recorder(session, log, wandb)  # type: ignore[arg-type]
    recorder.begin(1)
    recorder.event("step", step=3, loss=1.0)
    recorder.tick()
    assert wandb.told == ["step 3"] and recorder.failure is None and not recorder.cut_off
    fence_of(run, "another")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    session.state.step = 4
    for _ in range(2):
        recorder.tick()
        recorder.event("step", step=4, loss=1.0)
        recorder.alert("checkpoint not written", "")
    assert recorder.cut_off and recorder.flush() is None
    with pytest.raises(FencedError):
        recorder.settle()
    recorder.close(1)
    assert wandb.told[1:] == ["abandoned", "finished 1"], "of an abandoned client the end tells nothing"
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()} == before
