"""A start that was cut off and comes back when another has taken its run over: it writes nothing any more.

Real trainings. Each start but the last is stopped as a whole (SIGSTOP) at a point of its life, as a node that is cut
from the network goes silent. The next one takes over; then the one before it wakes up, while the next one sleeps.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mf_scale.errors import EXIT_GUARD
from mf_scale.rundir import RunDir, checkpoint_damage, committed_checkpoints
from tests.integration.program import ONE_THREAD, Run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
STEPS = 8
SETTINGS = (
    f"train.steps={STEPS}",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=2",
    "checkpoint.keep_best=false",
    "train.collective_timeout=200",
    "eval.every_steps=4",
    "eval.loss_samples=4",
    "tracking.wandb=disabled",
)
ALONE = (
    "start",  # has not taken the run yet
    "train.step step=1",  # trains on
    "save.snapshot step=2",  # is about to begin a save
    "save.part step=2",  # writes a part
    "save.rename step=2",  # has written all parts and the manifest
    "save.checked step=2",  # has seen that the run is still its own
    "save.renamed step=2",  # has committed, and would move `latest` and remove older ones
    "train.validation step=4",
    "save.retain step=6",  # removes an older checkpoint
)
FEW = ("start", "train.step step=1", "save.part step=2", "save.checked step=2", "save.retain step=6")
TWO_RANKS = ("save.part rank=1 step=2", "save.rename rank=0 step=2")


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Everything in a folder: when it was changed, and what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        held = str(path.readlink()) if path.is_symlink() else ""
        if path.is_file() and not path.is_symlink():
            held = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = (path.lstat().st_mtime_ns, held)
    return found


@contextmanager
def started(run: Run, restart: int, fault: str, processes: int) -> Iterator[subprocess.Popen[str]]:
    """A start of job 7; its whole process group ends with the block."""
    environment = {"SLURM_JOB_ID": "7", "MF_SCALE_FAULT": f"freeze {fault}" if fault else ""}
    if restart:
        environment["SLURM_RESTART_COUNT"] = str(restart)
    child = subprocess.Popen(
        run.command(*SETTINGS, processes=processes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **ONE_THREAD, **environment},  # as `whole`: sums on more threads round otherwise
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


def asleep(child: subprocess.Popen[str]) -> int:
    """Wait until the process or one of its children is stopped; its id."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()[1]
        ranks = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        for pid in (child.pid, *map(int, ranks)):
            if stopped(pid):
                return pid
        time.sleep(0.05)
    raise AssertionError("nobody fell asleep")


def wake(run: Run, sleeper: subprocess.Popen[str], pid: int, point: str) -> None:
    """It must find that the run is another's, change nothing, and end by itself."""
    before = contents(run.folder)
    deadline = time.monotonic() + 60
    while sleeper.poll() is None and time.monotonic() < deadline:
        if stopped(pid):  # a file has several parts
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
    assert sleeper.poll() is not None, point
    _, told = sleeper.communicate(timeout=10)
    after = contents(run.folder)
    assert sleeper.returncode == EXIT_GUARD, (point, told)
    assert told.count("mf-scale: another start of this run (job 7, restart ") == 1, (point, told)
    assert "Traceback" not in told, (point, told)
    assert {n for n in {*before, *after} if before.get(n) != after.get(n)} == set(), point


def relay(run: Run, points: tuple[str, ...], processes: int) -> str:
    """Each start falls asleep at its point, and wakes when the next one sleeps; what the last one said."""
    held: list[tuple[subprocess.Popen[str], int, str]] = []
    blocks = []
    try:
        for restart, point in enumerate((*points, "")):
            blocks.append(started(run, restart, point, processes))
            child = blocks[-1].__enter__()
            if point:
                held.append((child, asleep(child), point))
            else:
                _, told = child.communicate(timeout=120)
                assert child.returncode == 0, told
            if restart:
                wake(run, *held[restart - 1])
        return told
    finally:
        for block in blocks:
            block.__exit__(None, None, None)


def assert_undisturbed(run: Run, whole: Run) -> None:
    for event, key in (("step", "loss"), ("step", "grad_norm"), ("keys", "keys"), ("validation", "loss")):
        assert run.series(event, key) == whole.series(event, key), (event, key)
    for folder in committed_checkpoints(RunDir(run.folder)):
        assert checkpoint_damage(folder) is None
        for file in folder.glob("*.safetensors"):
            assert file.read_bytes() == (whole.folder / "checkpoints" / folder.name / file.name).read_bytes(), file.name
    left = sorted(entry.name for entry in (run.folder / "checkpoints").iterdir())
    assert left == ["latest", "step-00000006", "step-00000008"]


@pytest.mark.parametrize(
    "points", [FEW, pytest.param(ALONE, marks=pytest.mark.soak)], ids=["a few points", "every point"]
)
def test_a_start_that_was_cut_off_writes_nothing(tmp_path: Path, packed: Path, points: tuple[str, ...]) -> None:
    run, whole = Run(tmp_path / "run", packed), Run(tmp_path / "whole", packed)
    assert whole.train(*SETTINGS, processes=1).returncode == 0
    told = relay(run, points, processes=1)
    assert "at step 6" in told
    assert f"was taken over from an older start of this job (job 7, restart {len(points) - 1}" in told
    assert_undisturbed(run, whole)
    numbers = [r["start"] for r in run.records() if r["event"] == "start"]
    assert numbers == sorted(set(numbers)) and len(numbers) == len(points), "the one asleep before the lock had none"


@pytest.mark.soak
def test_the_ranks_of_a_start_that_was_cut_off_leave_together(tmp_path: Path, packed: Path) -> None:
    run, whole = Run(tmp_path / "run", packed), Run(tmp_path / "whole", packed)
    assert whole.train(*SETTINGS).returncode == 0
    relay(run, TWO_RANKS, processes=2)
    assert_undisturbed(run, whole)
