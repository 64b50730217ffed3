"""A rank that hangs ends all of them, with their stacks, and the next start goes on; one that was suspended lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.program import ONE_THREAD, SMALL, Run

pytestmark = pytest.mark.integration
SHORT = ["train.hang_timeout=4", "train.steps=6", "checkpoint.every_steps=2"]
SUSPENDED_SECONDS = 9.0


def test_a_hang_ends_all_ranks_with_their_stacks_and_the_next_start_goes_on_exactly(tmp_path, packed):
    run, suspended = Run(tmp_path / "run", packed), Run(tmp_path / "suspended", packed)
    hung = run.train(*SHORT, MF_SCALE_FAULT="hang train.step rank=1 step=3")
    assert hung.returncode == 75, hung.stderr
    assert run.train(*SHORT).returncode == 0
    train_suspended(suspended)
    assert run.series("step", "loss") == suspended.series("step", "loss")
    assert run.series("keys", "keys") == suspended.series("keys", "keys")
    for rank in (0, 1):
        file = run.folder / f"hang/start-1-rank-{rank}-of-2.txt"
        told = file.read_text()
        assert f"rank {rank} hangs: no sign of life for" in told
        assert "in phase step of step 3" in told
        assert "Thread 0x" in told
        assert "train_run" in told
        assert ("faults.py" in told) == (rank == 1)
        assert f"its stacks go to {file}" in hung.stderr
        keys = {line.split()[0] for line in told.partition("samples of step 3:")[2].splitlines() if line}
        assert keys == set(run.series("keys", "keys")[3][2 * rank : 2 * rank + 2])
    assert len(list((run.folder / "hang").iterdir())) == 2
    assert not (suspended.folder / "hang").exists()


def train_suspended(run: Run) -> None:
    """Train to the end; in the middle all ranks are stopped for twice the time limit and then go on."""
    log = (run.folder.parent / "suspended.log").open("w+")
    child = subprocess.Popen(
        run.command(*SHORT),
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={**os.environ, **ONE_THREAD, "MF_SCALE_FAULT": "freeze train.step step=3"},
    )
    try:
        ranks = wait_until_stopped(child)
        time.sleep(SUSPENDED_SECONDS)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        code = child.wait(timeout=100)
        log.seek(0)
        assert code == 0, log.read()
    finally:
        log.close()
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def wait_until_stopped(child: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of both ranks, once both are stopped."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and child.poll() is None:
        ranks = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
        if [state(pid) for pid in ranks] == ["T", "T"]:
            return ranks
        time.sleep(0.1)
    raise AssertionError("the ranks were not stopped")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.soak
def test_every_phase_gives_signs_of_life(tmp_path, packed):
    """Each batch of a validation and each look at a write that is waited for is one: both may take long."""
    more = ["train.steps=3", "train.micro_batch=4", "data.workers=0", "eval.every_steps=2", "eval.loss_samples=12"]
    overrides = [*SMALL, *Run(tmp_path / "run", packed).sources, *more, "checkpoint.every_steps=2"]
    script = Path(__file__).with_name("signs_of_life.py")
    done = subprocess.run(
        [sys.executable, str(script), *overrides, "checkpoint.asynchronous=false"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    signs = [tuple(sign) for sign in json.loads(done.stdout.splitlines()[-1])]
    assert list(dict.fromkeys(signs)) == [
        ("start", 0),
        *(("data", 1), ("step", 1), ("data", 2), ("step", 2)),
        *(("validation", 2), ("save", 2)),
        *(("data", 3), ("step", 3), ("save", 3), ("end", 3)),
    ]
    assert signs.count(("validation", 2)) == 1 + 12 // 4 + 1
    assert signs.count(("save", 2)) >= 2
