"""Work shared by processes: in order, a bar that moves within a job, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing

import psutil
import pytest

from data_tools.parallel import each, tick
from mf_scale.errors import FaultError, UserError


class Bar:
    """Remembers every update that moved it."""

    def __init__(self) -> None:
        self.moves: list[int] = []

    def update(self, amount: int) -> None:
        self.moves += [amount] if amount else []


def work(job: tuple[int, float]) -> tuple[int, int]:
    """Ten ticks, a pause after each."""
    number, pause = job
    for _ in range(10):
        time.sleep(pause)
        tick()
    return number, os.getpid()


def fail(number: int) -> int:
    if number == 2:
        raise UserError("the third job failed", where="here")
    for _ in range(600):
        time.sleep(0.05)
        tick()
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """What tells the processes begun since, that still live after a moment; Python's tracker of shared memory stays."""
    before = psutil.Process().children()  # of other tests' fixtures: a cluster stays up for a whole session

    def left() -> list[psutil.Process]:
        begun = [process for process in psutil.Process().children() if process not in before]
        living = psutil.wait_procs(begun, timeout=5)[1]
        return [process for process in living if "resource_tracker" not in " ".join(process.cmdline())]

    return left


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_the_bar_moves_within_a_job(workers):
    bar = Bar()
    jobs = [(0, 0.1), (1, 0.02), (2, 0.0), (3, 0.0)]
    results = list(each(work, jobs, workers=workers, bar=bar))
    assert [number for number, _ in results] == [0, 1, 2, 3]
    assert sum(bar.moves) == 40 and len(bar.moves) > 3
    pids = {pid for _, pid in results}
    assert pids == {os.getpid()} if workers == 1 else (len(pids) == 2 and os.getpid() not in pids)


def test_an_error_is_raised_as_it_is_and_calls_the_others_off(children):
    began = time.monotonic()
    with (
        pytest.raises(UserError, match="the third job failed"),
        closing(each(fail, [2, 0, 1], workers=3, bar=Bar())) as r,
    ):
        list(r)
    assert time.monotonic() - began < 15 and not children()


def test_closing_early_calls_the_work_off(children):
    results = each(work, [(number, 0.05) for number in range(50)], workers=2, bar=Bar())
    assert next(results)[0] == 0
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 5 and not children()


def test_a_killed_process_is_a_fault_of_the_surroundings(children):
    with pytest.raises(FaultError, match=r"a process of this command was killed.*fewer --workers") as raised:
        list(each(die, [0, 1], workers=2, bar=Bar()))
    assert raised.value.exit_code == 75 and not children()


def test_processes_end_soon_after_their_parent_was_killed():
    code = (
        "from data_tools.parallel import each\nfrom tests.unit.test_parallel import Bar, work\n"
        "print(*each(work, [(i, 0.2) for i in range(100)], workers=2, bar=Bar()))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(found := psutil.Process(parent.pid).children()) < 2:
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait(timeout=30)
    assert not psutil.wait_procs(found, timeout=20)[1]
