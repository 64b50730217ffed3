"""When checkpoints are saved, what the training pays, and what follows from a failure."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mf_scale import faults
from mf_scale.config.schema import Config
from mf_scale.data.state import SourcePart, open_segment
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.rundir import CONFIG, STATE, VOCABULARY, WEIGHTS, RunDir, checkpoint_damage, committed_checkpoints
from mf_scale.training import saver as module
from mf_scale.training.fence import FencedError
from mf_scale.training.leftovers import sweep
from mf_scale.training.saver import RETRY_SECONDS, Saver
from mf_scale.training.snapshot import FileContents
from mf_scale.training.state import TrainState
from tests.unit.test_rundir import fence_of


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.notes, self.alerts = list[str](), list[str]()
        self.unwritten: str | None = None

    def event(self, event: str, *, step: int | None = None, **values: Any) -> None:
        self.events.append({"event": event, "step": step, **values})

    def note(self, text: str) -> None:
        self.notes.append(text)

    def alert(self, title: str, text: str) -> None:
        self.alerts.append(f"{title}: {text}")

    def flush(self) -> str | None:
        return self.unwritten

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.events if record["event"] == event]


class Clock:
    """Time that a test moves on."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def make_state() -> TrainState:
    law = {"seed": 0, "block_samples": 4, "shuffle": "blocks", "repeat_threshold": 0.0}
    data, _ = open_segment(None, 0, [SourcePart("d", "d", samples=10, length=10, count=2)], **law)  # type: ignore[arg-type]
    return TrainState(step=0, updates=0, samples=0, quarantined=0, validated=0, data=data)


def make_session(folder: Path, *, resumed: bool = False, first: bool = True, **checkpoint: Any) -> Any:
    """What a saver uses of a session, with one weight."""
    config = Config(seed=3)
    for name, value in {"every_minutes": 0, "keep_last": 2, **checkpoint}.items():
        setattr(config.checkpoint, name, value)
    weight = torch.zeros(5)
    return SimpleNamespace(
        config=config,
        run=RunDir(folder),
        fence=fence_of(RunDir(folder)),
        world=World(0 if first else 1, 1 if first else 2, 0),
        device=torch.device("cpu"),
        state=make_state(),
        resumed=resumed,
        rolled_back=False,
        settings={CONFIG: "seed: 3\n", VOCABULARY: "{}"},
        engine=SimpleNamespace(
            stage=2, share_buffers=lambda: None, loss_scale=SimpleNamespace(to_list=lambda: [1.0, 0.0])
        ),
        weight=weight,
        contents=lambda: [FileContents(WEIGHTS, {"w": weight}, {})],
    )


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The writer waits for it before its first file."""
    gate, write = threading.Event(), module.write_files

    def gated(*arguments: Any) -> Any:
        assert gate.wait(30)
        return write(*arguments)

    monkeypatch.setattr(module, "write_files", gated)
    return gate


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(session: Any) -> list[int]:
    return [int(folder.name[-8:]) for folder in committed_checkpoints(session.run)]


def test_the_training_goes_on_while_the_thread_writes(tmp_path: Path, gate: threading.Event) -> None:
    session, recorder = make_session(tmp_path), Recorder()
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    saver.prepare()
    session.state.step, session.state.updates = 4, 3
    session.weight.fill_(4)
    saver.save()
    session.state.step, session.state.updates = 5, 4
    session.weight.fill_(5)
    assert not saver.written() and steps(session) == []
    gate.set()
    until(saver.written)
    assert steps(session) == [], "without a commit there is no checkpoint"
    saver.commit()
    assert not saver.written() and steps(session) == [4]
    folder = session.run.checkpoint(4)
    assert load_file(folder / WEIGHTS)["w"].tolist() == [4] * 5
    state = json.loads((folder / STATE).read_text())
    assert (state["step"], state["updates"], state["seed"], state["world"], state["zero_stage"]) == (4, 3, 3, 1, 2)
    assert state["wandb_id"] is None and torch.__version__.startswith(state["versions"]["torch"])
    assert TrainState.from_dict(state).to_dict() == {**session.state.to_dict(), "step": 4, "updates": 3}
    assert (folder / CONFIG).read_text() == "seed: 3\n"
    (event,) = recorder.of("save")
    assert (event["step"], event["path"]) == (4, "step-00000004")
    files = sum(f.stat().st_size for f in folder.iterdir() if f.name != "manifest.json")
    assert event["bytes"] == files and 0 < event["stall"] < event["seconds"]
    saver.commit()
    assert len(recorder.of("save")) == 1, "there was nothing to commit"


def test_never_two_writes_at_once(tmp_path: Path, gate: threading.Event) -> None:
    session, recorder = make_session(tmp_path), Recorder()
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    session.state.step = 4
    saver.save()
    threading.Timer(0.3, gate.set).start()
    session.state.step = 8
    assert saver.save() > 0.2, "it waits for the first one"
    assert steps(session) == [4]
    saver.finish()
    assert steps(session) == [8, 4]
    first, second = recorder.of("save")
    assert first["stall"] > 0.2, "what a second save waits for is a stall of the first one"
    assert second["step"] == 8


def test_synchronously_the_checkpoint_is_there_when_save_returns(tmp_path: Path) -> None:
    session, recorder = make_session(tmp_path, asynchronous=False), Recorder()
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    saver.prepare()
    session.state.step = 4
    saver.save()
    assert steps(session) == [4] and not saver.written()
    (event,) = recorder.of("save")
    assert event["stall"] == pytest.approx(event["seconds"], abs=0.05)
    saver.save()
    assert len(recorder.of("save")) == 1, "the same step is not saved again"


def test_by_the_clock_and_not_while_a_write_is_under_way(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    session = make_session(tmp_path, every_minutes=15)
    saver = Saver(session, Recorder())  # type: ignore[arg-type]
    assert not saver.due_by_time()
    clock.now += 15 * 60
    assert saver.due_by_time()
    session.state.step = 4
    saver.save()
    clock.now += 60 * 60
    assert not saver.due_by_time()
    gate.set()
    saver.finish()
    assert saver.due_by_time()
    other = Saver(make_session(tmp_path, every_minutes=15, first=False), Recorder())  # type: ignore[arg-type]
    clock.now += 60 * 60
    assert not other.due_by_time(), "the clock is rank 0's"


@pytest.mark.parametrize("point", ["save.part", "save.written", "save.manifest", "save.rename"])
def test_a_full_disk_is_said_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    clock, recorder = Clock(), Recorder()
    monkeypatch.setattr(module, "time", clock)
    session = make_session(tmp_path)
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    session.state.step = 4
    saver.save()
    saver.finish()
    monkeypatch.setenv(faults.VARIABLE, f"full {point}")
    session.state.step = 8
    saver.save()
    saver.finish()
    assert steps(session) == [4] and checkpoint_damage(session.run.checkpoint(4)) is None
    assert not [entry for entry in session.run.checkpoints.iterdir() if entry.name.startswith(".")]
    (event,) = recorder.of("save_failed")
    for text in (event["reason"], recorder.notes[0], recorder.alerts[0]):
        assert "No space left on device" in text
    assert "the run goes on" in recorder.notes[0]
    assert not saver.due_by_time()
    clock.now += RETRY_SECONDS
    assert saver.due_by_time()
    monkeypatch.delenv(faults.VARIABLE)
    session.state.step = 9
    saver.save()
    assert not saver.due_by_time()
    saver.finish()
    assert steps(session) == [9, 4]
    assert not saver.due_by_time(), "what succeeded is not tried again"


def test_the_last_save_commits_what_is_under_way_and_the_present_state(tmp_path: Path, gate: threading.Event) -> None:
    session = make_session(tmp_path)
    saver = Saver(session, Recorder())  # type: ignore[arg-type]
    session.state.step = 4
    saver.save()
    session.state.step = 6
    threading.Timer(0.1, gate.set).start()
    saver.save_last()
    assert steps(session) == [6, 4]
    saver.save_last()
    assert steps(session) == [6, 4]


def test_a_last_save_that_fails_is_a_mistake_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, recorder = make_session(tmp_path), Recorder()
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    session.state.step = 6
    monkeypatch.setenv(faults.VARIABLE, "full save.part")
    with pytest.raises(UserError, match=r"last checkpoint could not be written: .*No space left"):
        saver.save_last()
    assert not any("the run goes on" in note for note in recorder.notes)


def test_a_copy_that_fails_is_a_save_that_fails(tmp_path: Path) -> None:
    session, recorder = make_session(tmp_path), Recorder()
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    sound = session.contents

    def no_memory() -> None:
        raise RuntimeError("can't allocate memory")

    session.state.step, session.contents = 4, no_memory
    with pytest.raises(UserError, match=r"no host memory.*checkpoint\.asynchronous=false"):
        saver.prepare()
    saver.save()
    assert not saver.written() and "can't allocate memory" in recorder.of("save_failed")[0]["reason"]
    session.contents = sound
    saver.save_last()
    assert steps(session) == [4]


def test_a_run_that_resumed_does_not_save_its_checkpoint_again(tmp_path: Path) -> None:
    session, recorder = make_session(tmp_path, resumed=True), Recorder()
    session.state.step = 8
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    saver.save_last()
    assert recorder.events == []


def test_what_is_kept_and_where_latest_leads(tmp_path: Path) -> None:
    session = make_session(tmp_path, keep_every=8)
    saver = Saver(session, Recorder())  # type: ignore[arg-type]
    losses = {4: float("nan"), 8: 0.9, 12: 0.5, 16: 0.7, 20: float("nan")}
    for step in range(4, 29, 4):
        session.state.step = step
        if step in losses:
            session.state.note_validation(losses[step])
        saver.save()
        saver.finish()
    assert session.state.best == (12, 0.5) and session.state.validated == 20
    assert steps(session) == [28, 24, 16, 12, 8]
    assert (session.run.checkpoints / "latest").readlink() == Path("step-00000028")
    assert TrainState.from_dict(session.state.to_dict()).best == (12, 0.5)


def test_a_file_system_without_links_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, recorder = make_session(tmp_path), Recorder()
    monkeypatch.setattr(module, "point_latest", lambda *_: "no links here")
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    for session.state.step in (4, 8):
        saver.save()
        saver.finish()
    assert recorder.notes == ["no links here"]
    assert steps(session) == [8, 4]


@pytest.mark.parametrize("saved", [True, False], ids=["nothing left to save", "something left to save"])
def test_a_start_that_was_cut_off_does_not_end_as_its_run_does(tmp_path: Path, saved: bool) -> None:
    session, recorder = make_session(tmp_path), Recorder()
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    session.state.step = 4
    if saved:
        saver.save_last()
    fence_of(session.run, "another")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FencedError):
        saver.save_last()
    assert sorted(tmp_path.rglob("*")) == before and not recorder.notes


def test_a_save_under_way_when_another_start_takes_over_is_never_committed(
    tmp_path: Path, gate: threading.Event
) -> None:
    session, recorder = make_session(tmp_path), Recorder()
    saver = Saver(session, recorder)  # type: ignore[arg-type]
    session.state.step = 4
    saver.save()
    sweep(session.run, fence_of(session.run, "another"))
    gate.set()
    until(saver.written)
    with pytest.raises(FencedError):
        saver.commit()
    assert list(session.run.checkpoints.iterdir()) == [] and not recorder.of("save_failed")
