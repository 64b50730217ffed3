"""The run directory's lock: who may take it, who must wait, and that of several takers exactly one has it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mf_scale.errors import FaultError, UserError
from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import MetricsLog
from mf_scale.training import lock, slurm_jobs
from mf_scale.training.fence import LOCK, FencedError, read_holder
from mf_scale.training.lock import Taken, let_go, take_lock

HOST = os.uname().nodename
TAKER = """
import sys, time
from pathlib import Path
from mf_scale.errors import UserError
from mf_scale.rundir import RunDir
from mf_scale.training.lock import take_lock
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    pass
try:
    taken = take_lock(RunDir(Path(sys.argv[1])), [])
except UserError as error:
    print(type(error).__name__, error, flush=True)
else:
    print("taken", taken.fence.token, taken.start, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def held() -> Iterator[list[int]]:
    held: list[int] = []
    yield held
    let_go(held)


def be(monkeypatch: pytest.MonkeyPatch, job: str, restart: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def squeue(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> Path:
    """Let `squeue` be a script; the file in which it leaves what it was asked."""
    folder.mkdir(exist_ok=True)
    asked = folder / "asked"
    (folder / "squeue").write_text(f'#!/bin/sh\necho "$@" >> "{asked}"\n{script}\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return asked


def content(run: RunDir) -> list[str]:
    return (run.path / LOCK).read_text().split()


def take(folder: Path, held: list[int]) -> Taken:
    return take_lock(RunDir(folder), held)


def test_it_says_who_has_it_and_the_number_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    run = RunDir(tmp_path / "new/run")
    first = take_lock(run, held)
    assert content(run) == [str(os.getpid()), HOST, first.fence.token, "-", "0", "1"] and first.notes == []
    let_go(held)
    be(monkeypatch, "12", 3)
    second = take_lock(run, held)
    assert content(run) == [str(os.getpid()), HOST, second.fence.token, "12", "3", "2"] and second.notes == []
    second.fence.check()
    with pytest.raises(FencedError):
        first.fence.check()
    assert [file.name for file in run.path.iterdir()] == [LOCK]


def test_the_number_is_above_all_that_the_metrics_tell_of(tmp_path: Path, held: list[int]) -> None:
    for number in (None, None, 7):
        MetricsLog(tmp_path / "metrics.jsonl", start=number).write("start", 0)
    assert take(tmp_path, held).start == 8
    let_go(held)
    (tmp_path / LOCK).write_text("4711 node7 abc - 0 11\n")
    assert take(tmp_path, held).start == 12


@pytest.mark.parametrize("text", ["", "4711 node7", "4711 node7 abc\n", "\0\0", "x y z job many times"])
def test_whatever_an_older_program_or_a_crash_left_in_it_is_no_hindrance(
    tmp_path: Path, held: list[int], text: str
) -> None:
    (tmp_path / LOCK).write_text(text)
    assert take(tmp_path, held).start == 1


def test_another_process_is_named_by_pid_and_host_and_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    take(tmp_path, held)
    before = (tmp_path / LOCK).read_bytes()
    with pytest.raises(UserError, match=rf"pid and host: {os.getpid()} {HOST}\)"):
        take(tmp_path, [])
    be(monkeypatch, "12", 1)
    with pytest.raises(UserError, match=r"pid and host"):
        take(tmp_path, [])  # a job does not take it over from somebody outside
    assert (tmp_path / LOCK).read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [LOCK]


def test_a_glance_at_the_lock_is_no_training(tmp_path: Path, held: list[int]) -> None:
    take(tmp_path, held)
    let_go(held)
    glance = os.open(tmp_path / LOCK, os.O_RDONLY)  # as mf-scale doctor looks whether somebody trains here
    fcntl.flock(glance, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, (glance,)).start()
    assert take(tmp_path, held).start == 2


def test_an_older_start_of_the_same_job_is_taken_over_from_and_fenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    monkeypatch.setattr(lock, "still_known", lambda _: pytest.fail("SLURM need not be asked"))
    be(monkeypatch, "12", 1)
    old = take(tmp_path, held)
    with pytest.raises(UserError, match=r"job 12, restart 1\).*scancel 12"):
        take(tmp_path, [])  # the same start
    be(monkeypatch, "12", 3)
    new = take(tmp_path, held)
    assert f"older start of this job (job 12, restart 1, on {HOST}, pid {os.getpid()})" in new.notes[0]
    assert new.start == old.start + 1
    new.fence.check()
    with pytest.raises(FencedError, match=rf"job 12, restart 3, on {HOST}"):
        old.fence.check()


@pytest.mark.parametrize("ended", [False, True])
def test_a_start_that_is_older_itself_never_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int], ended: bool
) -> None:
    be(monkeypatch, "12", 3)
    new = take(tmp_path, held)
    if ended:
        let_go(held)
    be(monkeypatch, "12", 2)
    with pytest.raises(FencedError, match=r"came after this one.*remove .*\.lock"):
        take(tmp_path, [])
    new.fence.check()


STATES = {
    "echo RUNNING": True,
    "echo COMPLETING": True,
    "echo SUSPENDED": True,
    "echo PENDING": True,
    "echo COMPLETED; echo RUNNING": True,
    "echo COMPLETED": False,
    "echo NODE_FAIL": False,
    "echo TIMEOUT; echo CANCELLED": False,
    "true": False,
    "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1": False,
    "echo 'Unable to contact slurm controller' >&2; exit 1": True,
    "sleep 5; echo COMPLETED": True,
}


@pytest.mark.parametrize("answer", STATES)
def test_another_job_keeps_it_until_slurm_no_longer_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int], answer: str
) -> None:
    monkeypatch.setattr(slurm_jobs, "_SECONDS", 1.0)
    asked = squeue(monkeypatch, tmp_path / "bin", answer)
    be(monkeypatch, "12", 0)
    old = take(tmp_path / "run", held)
    be(monkeypatch, "13", 0)
    assert not asked.exists(), "SLURM is asked where somebody is in the way only"
    if STATES[answer]:
        with pytest.raises(UserError, match=r"job 12, restart 0\).*scancel 12"):
            take(tmp_path / "run", held)
        old.fence.check()
    else:
        new = take(tmp_path / "run", held)
        assert "taken over from job 12" in new.notes[0] and "SLURM no longer runs it" in new.notes[0]
        with pytest.raises(FencedError):
            old.fence.check()
    assert asked.read_text().split() == ["-h", "-t", "all", "-j", "12", "-o", "%T"]


def test_without_slurm_here_another_job_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    be(monkeypatch, "12", 0)
    take(tmp_path, held)
    be(monkeypatch, "13", 0)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="job 12, restart 0"):
        take(tmp_path, held)


def test_without_locks_the_newest_start_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    old, new = take(tmp_path, held), take(tmp_path, held)
    assert "this file system has no locks" in new.notes[0]
    new.fence.check()
    with pytest.raises(FencedError):
        old.fence.check()
    assert (old.start, new.start) == (1, 2) and [f.name for f in tmp_path.iterdir()] == [LOCK]
    be(monkeypatch, "12", 3)
    take(tmp_path, held)
    be(monkeypatch, "12", 2)
    with pytest.raises(FencedError):
        take(tmp_path, held)
    assert [f.name for f in tmp_path.iterdir()] == [LOCK]


def test_a_taker_that_was_killed_is_in_nobodys_way_and_one_that_hangs_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    (tmp_path / ".lock.next").write_text("1 node1 torn")
    assert take(tmp_path, held).start == 1
    let_go(held)
    monkeypatch.setattr(lock, "_TURN_SECONDS", 0.2)
    with (tmp_path / ".lock.next").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(FaultError, match="about to take"):
            take(tmp_path, held)
        assert time.monotonic() - began < 5


def test_the_file_that_became_the_lock_in_the_meantime_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[int]
) -> None:
    """Another taker has renamed it between our opening and our locking of it, and has ended already."""
    lock_it, calls = lock.try_lock, list[int]()

    def late(handle: int) -> bool | None:
        if not calls:
            (tmp_path / ".lock.next").write_text("4711 node7 abc - 0 5\n")
            (tmp_path / ".lock.next").rename(tmp_path / LOCK)
        calls.append(handle)
        return lock_it(handle)

    monkeypatch.setattr(lock, "try_lock", late)
    assert take(tmp_path, held).start == 6
    assert [f.name for f in tmp_path.iterdir()] == [LOCK]


def race(folder: Path, jobs: list[tuple[str, int]]) -> dict[int, str]:
    """Let processes take the lock at the same moment and hold it; what each says."""
    go, children = folder / "go", []
    try:
        for job, restart in jobs:
            environment = {**os.environ, "SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}
            command = [sys.executable, "-c", TAKER, str(folder / "run"), str(go)]
            pipe = subprocess.PIPE
            children.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True))
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
        go.touch()
        return {number: child.stdout.readline() for number, child in enumerate(children) if child.stdout is not None}
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_of_starts_that_take_it_over_at_once_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        folder, held = tmp_path / str(number), list[int]()
        be(monkeypatch, "7", 0)
        old = take(folder / "run", held)
        told = race(folder, [("7", 1)] * 4)
        won = [line.split() for line in told.values() if line.startswith("taken")]
        assert len(won) == 1, told
        assert sum(line.startswith("UserError another process is training") for line in told.values()) == 3
        holder = read_holder((folder / "run" / LOCK).read_text())
        assert holder is not None and [holder.token, str(holder.start)] == won[0][1:]
        with pytest.raises(FencedError):
            old.fence.check()
        let_go(held)


def test_of_several_starts_of_a_job_the_newest_has_it_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    be(monkeypatch, "7", 0)
    take(tmp_path / "run", held)
    told = race(tmp_path, [("7", restart) for restart in (1, 2, 3, 4)])
    holder = read_holder((tmp_path / "run" / LOCK).read_text())
    assert holder is not None and holder.restart == 4 and holder.token == told[3].split()[1]
    numbers = [int(line.split()[2]) for line in told.values() if line.startswith("taken")]
    assert len(set(numbers)) == len(numbers) and max(numbers) == holder.start
    assert all(line.startswith(("taken", "FencedError")) for line in told.values()), told
    let_go(held)
