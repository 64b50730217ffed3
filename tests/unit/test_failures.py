"""What a rank says and leaves when it fails; several at once: tests/integration/test_rank_failures.py."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from mf_scale import cli
from mf_scale.distributed import failures
from mf_scale.distributed.env import World
from mf_scale.distributed.failures import failure_of_peer, name_rank, tell_failure, watch_threads
from mf_scale.errors import FaultError, StoppedOnRequest, UserError
from mf_scale.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    (tmp_path / "metrics.jsonl").touch()
    return RunDir(tmp_path)


def _raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_an_error_is_said_once_however_often_it_passes_by(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    error = _raised(ValueError("at s3://me:secret@host/x"))
    for _ in range(2):
        tell_failure(error, World(3, 8, 1), run.path)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "rank 3 on node7: Traceback (most recent call last):"
    assert lines[-1] == "rank 3 on node7: ValueError: at s3://***@host/x"
    assert (
        all(line.startswith("rank 3 on node7: ") for line in lines) and sum("ValueError" in line for line in lines) == 1
    )
    assert failure_of_peer(World(0, 8, 0), run, 0.0) == "rank 3 on node7: ValueError: at s3://***@host/x"
    assert failure_of_peer(World(3, 8, 1), run, 0.0) is None, "it is no peer of its own"


def test_a_process_alone_writes_a_plain_traceback_and_leaves_nothing(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    tell_failure(_raised(ValueError("no")), World(), run.path)
    assert capfd.readouterr().err.startswith("Traceback (most recent call last):")
    assert not (run.path / "errors").exists()


def test_a_stop_is_no_failure_and_a_mistake_is_left_for_the_peers_only(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    world = World(1, 2, 1)
    tell_failure(StoppedOnRequest(), world, run.path)
    heard = UserError("everybody's mistake")
    heard.said_by_first_rank = True
    tell_failure(heard, world, run.path)
    assert not (run.path / "errors").exists()
    tell_failure(_raised(FaultError("its disk is gone", where="/scratch")), world, run.path)
    assert capfd.readouterr().err == ""
    assert failure_of_peer(World(0, 2, 0), run, 0.0) == "rank 1 on node7: its disk is gone"


def test_what_an_earlier_start_left_is_not_taken_for_this_one(
    run: RunDir, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = "told twice"
    for port in ("1", "2"):
        monkeypatch.setenv("MASTER_PORT", port)
        tell_failure(_raised(ValueError(error)), World(1, 2, 1), run.path)
    assert capfd.readouterr().err.count("Traceback") == 2
    (old, _) = sorted((run.path / "errors").glob("*.json"))
    for file in (run.path / "errors").glob("*.json"):
        file.write_text(json.dumps({**json.loads(old.read_text()), "time": time.time() - 3600}))
    tell_failure(_raised(ValueError(error)), World(1, 2, 1), run.path)
    assert capfd.readouterr().err.count("Traceback") == 1, "an hour ago is another start"


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "errors").write_text("a file")
    tell_failure(_raised(ValueError("no")), World(1, 2, 1), tmp_path)
    assert "Traceback" in capfd.readouterr().err


def test_threads_are_named_too(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0"), ("SLURMD_NODENAME", "node7")):
        monkeypatch.setenv(name, value)
    watch_threads()
    thread = threading.Thread(target=lambda: 1 / 0, name="writer")
    thread.start()
    thread.join()
    told = capfd.readouterr().err
    assert told.startswith("rank 2 on node7: in thread writer: Traceback") and "ZeroDivisionError" in told


def test_a_mistake_of_one_rank_carries_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name_rank("no", World(0, 4, 0)) == name_rank("no", World()) == "no"
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0"), ("SLURMD_NODENAME", "node7")):
        monkeypatch.setenv(name, value)
    assert cli.main(["wandb-sync", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("mf-scale: rank 2 on node7: there is no such run directory (/nowhere).")


def test_the_folder_stays_small(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failures, "KEPT", 3)
    for port in range(6):
        monkeypatch.setenv("MASTER_PORT", str(port))
        tell_failure(_raised(ValueError("no")), World(1, 2, 1), run.path)
    assert len(list((run.path / "errors").iterdir())) == 3
    assert capfd.readouterr().err.count("Traceback") == 6
