"""Before a run starts: the directory is the same on every node, and what earlier starts left is cleaned up."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.rundir import MANIFEST, RunDir, committed_checkpoints
from mf_scale.training import preflight
from mf_scale.training.preflight import refuse_unshared, settle
from tests.unit.test_rundir import make


@pytest.fixture
def held() -> list[int]:
    return []


def lock(run: RunDir, token: str, held: list[int]) -> None:
    assert preflight._lock(run, token, held) == []


def test_a_run_dir_that_a_node_does_not_share_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    monkeypatch.setattr(preflight, "_SHARED_SECONDS", 0.3)
    shared, other, older = (RunDir(tmp_path / name) for name in ("shared", "other", "older"))
    lock(shared, "abc", held)
    lock(older, "of an earlier start", held)
    refuse_unshared(shared, "abc", World(1, 2, 0))
    for run in (other, older):
        with pytest.raises(UserError, match=rf"rank 1 on {os.uname().nodename} does not see .*all nodes share"):
            refuse_unshared(run, "abc", World(1, 2, 0))
    while held:
        os.close(held.pop())


def test_a_network_file_system_gets_some_time(tmp_path: Path, held: list[int]) -> None:
    run, began = RunDir(tmp_path), time.monotonic()
    threading.Timer(0.5, lambda: lock(run, "abc", held)).start()
    refuse_unshared(run, "abc", World(1, 2, 0))
    assert time.monotonic() - began >= 0.4
    while held:
        os.close(held.pop())


def test_another_process_is_named_by_pid_and_host(tmp_path: Path, held: list[int]) -> None:
    run = RunDir(tmp_path)
    lock(run, "abc", held)
    with pytest.raises(UserError, match=rf"pid and host: {os.getpid()} {os.uname().nodename}\)"):
        preflight._lock(run, "def", [])
    while held:
        os.close(held.pop())


def test_damaged_ones_of_this_start_stay_and_of_earlier_starts_the_newest(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in range(1, 8):
        make(run, step)
    settle(run, {}, [run.checkpoint(1), run.checkpoint(2)])
    notes = settle(run, {"config.yaml": "seed: 1"}, [run.checkpoint(3), run.checkpoint(4)])
    assert len(notes) == 1 and notes[0].startswith("removed step-00000001.damaged")
    (run.checkpoint(5) / MANIFEST).unlink()
    notes = settle(run, {}, [])
    assert [note.split()[1] for note in notes[:2]] == ["step-00000002.damaged,", "step-00000003.damaged,"]
    assert "step-00000005 has no manifest" in notes[2] and (run.checkpoint(5) / "weights.safetensors").is_file()
    assert len(committed_checkpoints(run)) == 2 and run.config.read_text() == "seed: 1"
