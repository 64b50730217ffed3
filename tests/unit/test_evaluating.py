"""An evaluation in a training: when it is due, what it must not disturb, what becomes of one that fails."""

from __future__ import annotations

import gc
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mf_scale.config.schema import Config
from mf_scale.data.state import DataState
from mf_scale.distributed.env import World
from mf_scale.errors import GuardError, UserError
from mf_scale.training import evaluating
from mf_scale.training.evaluating import _undisturbed, evaluate_now, evaluation_due
from mf_scale.training.fence import FencedError
from mf_scale.training.state import TrainState


class Desk:
    """Recorder, saver and watchdog in one: keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.newest, self.due = 0, False

    def event(self, name: str, **values: Any) -> None:
        self.told.append((name, values))

    def evaluation(self, results: dict[str, Any]) -> None:
        self.told.append(("evaluation", results))

    def note(self, text: str) -> None:
        self.told.append(("note", text))

    def alert(self, title: str, text: str) -> None:
        self.told.append(("alert", title, text))

    def alive(self, *sign: Any) -> None:
        self.told.append(("alive", *sign))

    def tick(self) -> None:
        self.told.append(("tick",))

    def due_by_time(self) -> bool:
        return self.due

    def written(self) -> bool:
        return True

    def commit(self) -> None:
        self.told.append(("commit",))

    def save(self) -> float:
        self.told.append(("save",))
        self.newest = 6
        return 0.0

    def of(self, *names: str) -> list[tuple[Any, ...]]:
        return [told for told in self.told if told[0] in names]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(evaluating, "present_model", lambda _: nn.Identity())
    config = Config()
    config.eval.metrics_every_steps = 3
    state = TrainState(step=6, updates=6, samples=0, quarantined=0, validated=0, data=DataState(()), evaluated=3)
    rest = {"run": None, "fence": None, "device": torch.device("cpu"), "world": World()}
    return SimpleNamespace(config=config, state=state, validation="index", **rest)


def run(session: Any, desk: Any, evaluate: Any, stop: Any = lambda: False, adds: Any = lambda: True) -> float:
    return evaluate_now(session, desk, desk, desk, evaluate, stop, adds)


def two_images(*_: Any, stop: Any, **__: Any) -> dict[str, Any] | None:
    """An evaluation of two images."""
    return None if any(stop() for _ in range(3)) else {"mIoU": 0.25, "PQ": None, "AP": 0.5, "samples": 2}


def test_when_it_is_due(session: Any) -> None:
    assert evaluation_due(session, two_images)
    assert not evaluation_due(session, None)
    for change in ({"evaluated": 6}, {"step": 7}, {"step": 0, "evaluated": -1}):
        for name, value in change.items():
            setattr(session.state, name, value)
        assert not evaluation_due(session, two_images), change
        session.state.step, session.state.evaluated = 6, 3
    session.validation = None
    assert not evaluation_due(session, two_images)
    session.validation, session.config.eval.metrics_every_steps = "index", 0
    assert not evaluation_due(session, two_images)


def test_one_is_told_with_signs_of_life_and_saves_on_its_way(session: Any) -> None:
    desk = Desk()
    desk.due = True
    assert run(session, desk, two_images) > 0
    assert session.state.evaluated == 6
    assert desk.of("evaluation") == [("evaluation", {"mIoU": 0.25, "PQ": None, "AP": 0.5, "samples": 2})]
    (note,) = desk.of("note")
    assert "step 6: mIoU 25.00, AP 50.00 on 2 images" in note[1]
    assert [sign[1:] for sign in desk.of("alive") if len(sign) == 4][-1] == ("evaluation", 6, 2)
    assert len(desk.of("save")) == 1  # the state does not change meanwhile
    assert len(desk.of("commit")) == len(desk.of("tick")) == 3  # `status` sees that the run lives


def test_a_stop_leaves_it_due_and_one_that_came_before_begins_nothing(session: Any) -> None:
    desk, asked = Desk(), iter([False, False, True])
    run(session, desk, two_images, lambda: next(asked))
    assert session.state.evaluated == 3 and not desk.of("evaluation", "note")
    assert run(session, Desk(), None, lambda: True) == 0.0


def test_one_that_fails_is_told_and_the_run_goes_on(session: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UserError("sample x does not decode", where="shard-0 at byte 9", remedy="Pack it again.")

    desk = Desk()
    run(session, desk, fail)
    assert session.state.evaluated == 6  # else it would fail again at every start
    told = {"reason": "sample x does not decode", "where": "shard-0 at byte 9", "remedy": "Pack it again."}
    assert desk.of("evaluation_failed") == [("evaluation_failed", told)]
    assert all(word in desk.of("note")[0][1] for word in told.values()) and desk.of("alert")


@pytest.mark.parametrize("kind", [FencedError, GuardError])
def test_a_start_that_was_cut_off_ends(session: Any, kind: type[GuardError]) -> None:
    """On the rank that found it, and on those that heard of it in a collective."""

    def overtaken(*_: Any, **__: Any) -> None:
        raise kind("another start has taken over")

    with pytest.raises(kind):
        run(session, Desk(), overtaken)


def test_nothing_is_saved_in_a_row_of_dead_steps(session: Any) -> None:
    desk = Desk()
    desk.due = True
    run(session, desk, two_images, adds=lambda: False)
    assert not desk.of("save")


def test_generators_and_collector_are_as_they_were() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(1)), float(np.random.rand()), random.random()

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    wanted = draw()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    gc.disable()
    torch.backends.cudnn.benchmark = True
    try:
        with pytest.raises(UserError), _undisturbed(torch.device("cpu")):
            torch.manual_seed(9)
            draw()
            assert gc.isenabled() and not torch.backends.cudnn.benchmark
            raise UserError("in the middle")
        assert not gc.isenabled() and torch.backends.cudnn.benchmark
    finally:
        gc.enable()
        torch.backends.cudnn.benchmark = False
    assert draw() == wanted


def test_a_checkpoint_from_before_this_was_kept_is_read(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataState, "from_dict", lambda _: session.state.data)
    told = session.state.to_dict()
    assert TrainState.from_dict(told).evaluated == 3
    del told["evaluated"]
    assert TrainState.from_dict(told).evaluated == 0
