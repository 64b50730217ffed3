"""Before a run starts: the directory is the same on every node, and what earlier starts left is cleaned up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.rundir import CONFIG, MANIFEST, RunDir, committed_checkpoints
from mf_scale.training import preflight
from mf_scale.training.fence import LOCK, Fence, FencedError
from mf_scale.training.lock import let_go, take_lock
from mf_scale.training.preflight import refuse_unshared, settle
from tests.unit.test_rundir import make

SECOND = World(1, 2, 0)


@pytest.fixture
def held() -> Iterator[list[int]]:
    held: list[int] = []
    yield held
    let_go(held)


def test_a_run_dir_that_a_node_does_not_share_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    monkeypatch.setattr(preflight, "_SHARED_SECONDS", 0.3)
    shared, other, older = (RunDir(tmp_path / name) for name in ("shared", "other", "older"))
    token = take_lock(shared, held).fence.token
    take_lock(older, held)
    refuse_unshared(shared, Fence(shared.path / LOCK, token), SECOND)
    for run in (other, older):
        with pytest.raises(UserError, match=rf"rank 1 on {os.uname().nodename} does not see .*all nodes share"):
            refuse_unshared(run, Fence(run.path / LOCK, token), SECOND)


def test_a_network_file_system_gets_some_time(tmp_path: Path) -> None:
    fence, began = Fence(tmp_path / LOCK, "abc"), time.monotonic()
    threading.Timer(0.5, lambda: fence.path.write_text("4711 node1 abc - 0 1\n")).start()
    refuse_unshared(RunDir(tmp_path), fence, SECOND)
    assert time.monotonic() - began >= 0.4


def test_a_rank_0_that_was_overtaken_does_not_blame_the_file_system(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("4711 node2 def 7 1 2\n")
    with pytest.raises(FencedError, match="job 7, restart 1, on node2"):
        refuse_unshared(RunDir(tmp_path), Fence(tmp_path / LOCK, "abc"), World(0, 2, 0))


def test_damaged_ones_of_this_start_stay_and_of_earlier_starts_the_newest(tmp_path: Path, held: list[int]) -> None:
    run = RunDir(tmp_path)
    fence = take_lock(run, held).fence
    for step in range(1, 8):
        make(run, step)
    settle(run, fence, {}, [run.checkpoint(1), run.checkpoint(2)])
    notes = settle(run, fence, {"config.yaml": "seed: 1"}, [run.checkpoint(3), run.checkpoint(4)])
    assert len(notes) == 1 and notes[0].startswith("removed step-00000001.damaged")
    (run.checkpoint(5) / MANIFEST).unlink()
    notes = settle(run, fence, {}, [])
    assert [note.split()[1] for note in notes[:2]] == ["step-00000002.damaged,", "step-00000003.damaged,"]
    assert "step-00000005 has no manifest" in notes[2] and (run.checkpoint(5) / "weights.safetensors").is_file()
    assert len(committed_checkpoints(run)) == 2 and run.config.read_text() == "seed: 1"


def test_a_start_that_was_overtaken_settles_nothing(tmp_path: Path, held: list[int]) -> None:
    run = RunDir(tmp_path)
    fence = take_lock(run, held).fence
    make(run, 1)
    (run.path / CONFIG).write_text("seed: 1")
    (run.path / LOCK).write_text("4711 node2 def 7 1 2\n")
    with pytest.raises(FencedError):
        settle(run, fence, {CONFIG: "seed: 2"}, [run.checkpoint(1)])
    assert len(committed_checkpoints(run)) == 1 and run.config.read_text() == "seed: 1"
    with pytest.raises(FencedError):
        fence.write(run.config, "seed: 2")
    assert sorted(file.name for file in run.path.iterdir()) == [LOCK, "checkpoints", CONFIG]
    assert run.config.read_text() == "seed: 1"
