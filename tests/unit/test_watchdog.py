"""The watchdog in real processes: what it ends, how, and what it lets live."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mf_scale.distributed.env import World
from mf_scale.errors import EXIT_FAULT
from mf_scale.training.watchdog import KEPT, Watchdog

SCRIPT = Path(__file__).with_name("watched_process.py")


def start(doing: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), doing, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(child: subprocess.Popen[str], timeout: float = 60) -> tuple[int, str, str]:
    try:
        out, err = child.communicate(timeout=timeout)
    finally:
        child.kill()
    return child.returncode, out, err


def test_a_hang_is_told_with_phase_step_stacks_and_samples(tmp_path):
    code, _, err = end(start("hang", tmp_path / "hang"))
    assert code == EXIT_FAULT, err
    (file,) = (tmp_path / "hang").iterdir()
    assert file.name == "start-7-rank-1-of-2.txt"
    told = file.read_text()
    assert told.startswith("rank 1 hangs: no sign of life for 1 s, in phase step of step 2\n")
    assert f"on {os.uname().nodename}" in told
    assert 'watched_process.py", line' in told
    assert "key-2  source/shard-000.tar" in told
    assert str(file) in err


def test_a_phase_that_is_new_may_take_five_times_as_long(tmp_path):
    code, _, _ = end(start("hang-in-a-new-phase", tmp_path / "hang"))
    assert code == EXIT_FAULT
    (file,) = (tmp_path / "hang").iterdir()
    assert "rank 1 hangs: no sign of life for 5 s, in phase validation" in file.read_text()


def test_a_hang_in_an_evaluation_names_its_image(tmp_path):
    code, _, err = end(start("hang-in-an-evaluation", tmp_path / "hang"))
    assert code == EXIT_FAULT, err
    (file,) = (tmp_path / "hang").iterdir()
    told = file.read_text()
    assert told.startswith("rank 1 hangs: no sign of life for 1 s, in phase evaluation of step 2\n")
    assert told.endswith("this rank's samples of turn 1 of the evaluation at step 2:\nimage 1 of phase evaluation\n")


def test_what_is_slow_but_alive_lives(tmp_path):
    """In a phase that is new its stacks are written all the same, and taken back once it goes on."""
    code, out, err = end(start("work-slowly", tmp_path / "hang"))
    assert code == 0, err
    assert out.endswith("lived\n")
    told = "rank 1: no sign of life for 1 s, in phase validation of step 5, which is new and may take 5 s"
    first, second = err.splitlines()
    assert first == f"mf-scale: {told}; its stacks go to {tmp_path}/hang/start-7-rank-1-of-2.txt"
    assert second in [f"mf-scale: rank 1 goes on after {seconds} s" for seconds in (2, 3)]
    assert not (tmp_path / "hang").exists()


def test_in_a_phase_that_is_new_stacks_lie_there_before_its_peers_lose_patience(tmp_path):
    """Their collectives have a time limit, and the launcher then kills the rank that hangs."""
    child = start("hang-in-a-new-phase", tmp_path / "hang")
    file, deadline = tmp_path / "hang/start-7-rank-1-of-2.txt", time.monotonic() + 30
    try:
        while not (file.is_file() and "samples of step 2" in file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert child.poll() is None  # it has its time
        child.kill()
        assert file.read_text().startswith("rank 1: no sign of life for 1 s, in phase validation of step 2, which is")
        assert 'watched_process.py", line' in file.read_text()
    finally:
        end(child)


def test_a_process_that_holds_the_interpreter_is_ended_by_the_timer(tmp_path):
    code, _, err = end(start("hold-the-lock", tmp_path / "hang"))
    assert code == 1
    assert "Timeout" in err
    assert 'watched_process.py", line' in err


def test_a_report_that_cannot_be_written_goes_to_stderr(tmp_path):
    code, _, err = end(start("write-nowhere", tmp_path / "hang"))
    assert code == EXIT_FAULT
    assert "cannot be written" in err
    assert 'watched_process.py", line' in err


def test_an_index_that_hangs_too_costs_the_samples_only(tmp_path):
    code, _, err = end(start("hang-in-the-index-too", tmp_path / "hang"))
    assert code == EXIT_FAULT, err
    (file,) = (tmp_path / "hang").iterdir()
    assert 'watched_process.py", line' in file.read_text()


def test_old_reports_are_swept_by_rank_0(tmp_path):
    for number in range(KEPT + 5):
        file = tmp_path / f"start-{number}-rank-0-of-1.txt"
        file.write_text("x")
        os.utime(file, (number, number))
    Watchdog(World(), tmp_path, timeout=0, last_resort=0).opened(99, lambda *_: [])
    assert len(list(tmp_path.iterdir())) == KEPT + 5  # where nothing is watched, nothing is touched
    watchdog = Watchdog(World(), tmp_path, timeout=60, last_resort=60)
    watchdog.start()
    watchdog.opened(99, lambda *_: [])
    watchdog.close()
    assert {f.name for f in tmp_path.iterdir()} == {f"start-{n}-rank-0-of-1.txt" for n in range(5, KEPT + 5)}


def test_a_sign_of_life_costs_nothing_to_speak_of(tmp_path):
    watchdog = Watchdog(World(), tmp_path, timeout=0, last_resort=0)
    began = time.perf_counter()
    for step in range(10_000):
        watchdog.alive("step", step)
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize("phase", ["data", "start"])
def test_another_session_warms_up_anew(tmp_path, phase):
    watchdog = Watchdog(World(), tmp_path, timeout=0, last_resort=0)
    watchdog.alive("data", 1)
    watchdog.alive("step", 1)
    watchdog.alive(phase, 1)
    assert ("step" in watchdog._passed) == (phase == "data")
