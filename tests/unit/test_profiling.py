"""The profiler of named steps: real recordings of small operations, whole files or none."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mf_scale import faults
from mf_scale.config.schema import TrainConfig
from mf_scale.distributed.env import World
from mf_scale.rundir import RunDir
from mf_scale.training import profiling
from mf_scale.training.profiling import Profiler, is_profiled, profiled


class Desk:
    """Recorder, watchdog and fence, as far as a profiler needs them."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.signs: list[tuple[str, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def alive(self, phase: str, step: int) -> None:
        self.signs.append((phase, step))

    def check(self) -> None:
        pass


def session(folder: Path, *, step: int = 0, rank: int = 0, first_last: tuple[int, ...] = (2, 3)) -> Any:
    train = TrainConfig(profile=list(first_last), profile_ranks=[0])
    return SimpleNamespace(
        run=RunDir(folder),
        config=SimpleNamespace(train=train),
        world=World(rank, 2, rank),
        device=torch.device("cpu"),
        state=SimpleNamespace(step=step),
        fence=Desk(),
    )


def take_steps(profiler: Profiler, about: Any, until: int, *, looks: bool = False) -> list[float]:
    """Steps of a matrix product each; the seconds that the profiler took behind them."""
    seconds = []
    while about.state.step < until:
        profiler.begin_step()
        torch.ones(8, 8) @ torch.ones(8, 8)
        about.state.step += 1
        seconds.append(profiler.end_step(looks=looks))
    return seconds


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "profile").glob("*"))


def marked_steps(file: Path) -> list[str]:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    return sorted({event["name"] for event in events if str(event.get("name", "")).startswith("step ")})


WHOLE = ["steps-2-3-rank-0.json.gz", "steps-2-3-rank-0.txt"]


def test_the_steps_that_are_named_are_recorded_and_no_others(tmp_path: Path) -> None:
    about, desk = session(tmp_path), Desk()
    with profiled(about, desk, desk) as profiler:  # type: ignore[arg-type]
        seconds = take_steps(profiler, about, 5)
    assert files(tmp_path) == WHOLE
    assert marked_steps(tmp_path / "profile" / WHOLE[0]) == ["step 2", "step 3"]
    assert "aten::mm" in (tmp_path / "profile" / WHOLE[1]).read_text()
    assert desk.notes == [f"the profile of steps 2 to 3 is in {tmp_path}/profile"]
    assert desk.signs == [("profile", 3)]
    assert seconds[2] > 0 and seconds[0] == seconds[3] == seconds[4] == 0


def test_an_evaluation_between_them_is_in_no_profile(tmp_path: Path) -> None:
    about, desk = session(tmp_path, first_last=(2, 4)), Desk()
    with profiled(about, desk, desk) as profiler:  # type: ignore[arg-type]
        take_steps(profiler, about, 2, looks=True)
        torch.ones(2).digamma()
        take_steps(profiler, about, 5)
    names = ["steps-2-2-rank-0", "steps-3-4-rank-0"]
    assert files(tmp_path) == sorted(f"{name}.{end}" for name in names for end in ("json.gz", "txt"))
    assert [marked_steps(tmp_path / f"profile/{name}.json.gz") for name in names] == [["step 2"], ["step 3", "step 4"]]
    assert not any("digamma" in file.read_text() for file in (tmp_path / "profile").glob("*.txt"))


@pytest.mark.parametrize(("rank", "step", "first_last"), [(1, 0, (2, 3)), (0, 3, (2, 3)), (0, 0, ())])
def test_other_ranks_later_starts_and_runs_without_a_profile_do_nothing(
    tmp_path: Path, rank: int, step: int, first_last: tuple[int, ...]
) -> None:
    about, desk = session(tmp_path, rank=rank, step=step, first_last=first_last), Desk()
    profiler = Profiler(about, desk, desk)  # type: ignore[arg-type]
    assert take_steps(profiler, about, step + 4) == [0] * 4
    profiler.close()
    assert not (tmp_path / "profile").exists()
    assert (desk.notes, desk.signs) == ([], [])
    began = time.perf_counter()
    for _ in range(10_000):
        profiler.begin_step()
        profiler.end_step()
    assert time.perf_counter() - began < 0.5


def test_a_run_that_is_killed_at_the_files_leaves_none_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(point: str, **_: int) -> None:
        assert point == "profile.written"
        raise Killed

    about, desk = session(tmp_path), Desk()
    with monkeypatch.context() as patch:
        patch.setattr(faults, "reach", kill)
        with pytest.raises(Killed):
            take_steps(Profiler(about, desk, desk), about, 3)  # type: ignore[arg-type]
    assert files(tmp_path) == sorted(f".writing-{name}" for name in WHOLE)
    again = session(tmp_path, step=2)  # it goes on in the middle of the steps
    take_steps(Profiler(again, desk, desk), again, 4)  # type: ignore[arg-type]
    assert files(tmp_path) == ["steps-3-3-rank-0.json.gz", "steps-3-3-rank-0.txt"]
    assert marked_steps(tmp_path / "profile/steps-3-3-rank-0.json.gz") == ["step 3"]


def test_a_full_disk_costs_the_profile_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "full profile.written rank=0 step=3")
    about, desk = session(tmp_path), Desk()
    take_steps(Profiler(about, desk, desk), about, 4)  # type: ignore[arg-type]
    assert not [name for name in files(tmp_path) if not name.startswith(".writing-")]
    assert desk.notes == [f"the profile of steps 2 to 3 was not written: cannot write: {os.strerror(28)}"]


@pytest.mark.parametrize(("steps", "told"), [(1, False), (2, True)])
def test_a_stop_in_between_throws_away_what_was_recorded_and_the_next_profile_works(
    tmp_path: Path, steps: int, told: bool
) -> None:
    """Also where the profiler was only being made ready."""
    about, desk = session(tmp_path), Desk()
    with profiled(about, desk, desk) as profiler:  # type: ignore[arg-type]
        take_steps(profiler, about, steps)
    assert not (tmp_path / "profile").exists()
    assert bool(desk.notes) == told
    again = session(tmp_path)
    take_steps(Profiler(again, desk, desk), again, 3)  # type: ignore[arg-type]
    assert files(tmp_path) == WHOLE


def test_which_steps() -> None:
    config = TrainConfig(profile=[2, 4])
    assert [step for step in range(7) if is_profiled(config, step)] == [2, 3, 4]
    assert not any(is_profiled(TrainConfig(), step) for step in range(7))
    assert profiling.FOLDER == "profile"
