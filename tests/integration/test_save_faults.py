"""Whatever happens to a save, the run goes on from a sound checkpoint as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mf_scale.rundir import RunDir, checkpoint_damage, checkpoint_step, committed_checkpoints
from tests.integration.program import LARGER, Run

pytestmark = pytest.mark.integration
STEPS = 12
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.keep_last=2", "tracking.wandb=disabled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "undisturbed", packed)
    done = run.train(*SETTINGS, "checkpoint.keep_last=6")
    assert done.returncode == 0, done.stderr
    return run


def steps(run: Run) -> list[int]:
    return [checkpoint_step(folder) for folder in committed_checkpoints(RunDir(run.folder))]


def assert_same_history(run: Run, undisturbed: Run) -> None:
    for event, key in (("step", "loss"), ("step", "grad_norm"), ("keys", "keys")):
        assert run.series(event, key) == undisturbed.series(event, key), (event, key)
    names = {"weights.safetensors", "partition-00000-of-00002.safetensors", "partition-00001-of-00002.safetensors"}
    for name in names:
        ours, theirs = (r.folder / f"checkpoints/step-{STEPS:08d}" / name for r in (run, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes(), name


KILLS = (
    # point, rank, step of the save, checkpoints that are there afterwards
    ("save.snapshot", 1, 4, [2]),
    ("save.part", 1, 6, [4, 2]),
    ("save.written", 0, 6, [4, 2]),
    ("save.manifest", 0, 6, [4, 2]),
    ("save.rename", 0, 8, [6, 4]),
    ("save.renamed", 0, 8, [8, 6, 4]),
    ("save.retain", 0, 10, [10, 8, 6]),
)


@pytest.mark.timeout(600)
def test_killed_at_every_boundary_of_a_save(tmp_path: Path, packed: Path, undisturbed: Run) -> None:
    """One run, killed seven times: each start goes on from what the kill before it left."""
    run = Run(tmp_path / "run", packed)
    resumes = 0
    for point, rank, step, left in KILLS:
        order = f"kill {point} rank={rank} step={step}"
        killed = run.train(*SETTINGS, MF_SCALE_FAULT=order)
        assert killed.returncode not in (0, 2, 3), (order, killed.stderr)
        assert "mf-scale: the last checkpoint" not in killed.stderr
        assert (f"at step {resumes:,}" in killed.stderr) == bool(resumes), (order, killed.stderr)
        assert steps(run) == left, order
        assert all(checkpoint_damage(folder) is None for folder in committed_checkpoints(RunDir(run.folder))), order
        resumes = left[0]
    (removed,) = [entry.name for entry in (run.folder / "checkpoints").iterdir() if entry.name.startswith(".")]
    assert re.fullmatch(r"\.removing-[0-9a-f]{16}-step-00000004", removed), "killed in the middle of a removal"
    done = run.train(*SETTINGS)
    assert done.returncode == 0, done.stderr
    assert f"removed the unfinished {removed}" in done.stderr
    assert_same_history(run, undisturbed)
    names = sorted(entry.name for entry in (run.folder / "checkpoints").iterdir())
    assert names == ["latest", "step-00000010", "step-00000012"]
    assert (run.folder / "checkpoints/latest").readlink() == Path("step-00000012")


def test_truncated_altered_and_missing_files_are_walked_back_from(
    tmp_path: Path, packed: Path, undisturbed: Run
) -> None:
    run = Run(tmp_path / "run", packed)
    shutil.copytree(undisturbed.folder, run.folder, symlinks=True)
    truncated, altered, missing = (run.folder / f"checkpoints/step-{step:08d}" for step in (12, 10, 8))
    os.truncate(truncated / "weights.safetensors", 5000)
    file = altered / "partition-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5000] ^= 4
    file.write_bytes(data)
    (missing / "partition-00000-of-00002.safetensors").unlink()
    done = run.train(*SETTINGS)
    assert done.returncode == 0, done.stderr
    for folder, words in ((truncated, "has 5000 bytes"), (altered, "was altered"), (missing, "is missing")):
        (said,) = [line for line in done.stderr.splitlines() if f"{folder} is damaged" in line]
        assert words in said
        assert folder.with_name(f"{folder.name}.damaged").is_dir()
    assert "at step 6" in done.stderr
    assert_same_history(run, undisturbed)


def test_a_stop_signal_in_the_middle_of_a_write_spoils_nothing(tmp_path: Path, packed: Path, undisturbed: Run) -> None:
    run = Run(tmp_path / "run", packed)
    stopped = run.train(*SETTINGS, MF_SCALE_FAULT="stop save.part rank=1 step=4")
    assert stopped.returncode == 85, stopped.stderr
    newest = steps(run)[0]
    saves = [record["step"] for record in run.records() if record["event"] == "save"]
    assert 4 in saves, "the write that the signal met was finished and committed"
    assert all(checkpoint_damage(folder) is None for folder in committed_checkpoints(RunDir(run.folder)))
    assert run.last_step() == newest
    done = run.train(*SETTINGS)
    assert done.returncode == 0, done.stderr
    assert f"at step {newest}" in done.stderr
    assert_same_history(run, undisturbed)


def fill(ballast: Path, left: int) -> None:
    """Let `ballast` grow until `left` bytes of its disk are free."""
    with ballast.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while (free := shutil.disk_usage(ballast.parent).free - left) > 0:
            stream.write(bytes(min(free, 2**20)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize("left", [8 * 2**20, 0])
def test_a_disk_that_is_full_for_a_while_costs_the_saves_of_that_time(
    small_disk: Path, packed: Path, left: int
) -> None:
    """In the thread that writes, while the training goes on. With no byte left the metrics wait in memory too."""
    run = Run(small_disk / "run", packed)
    seen: dict[str, list[int]] = {}

    def wait_for(event: str) -> bool:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            if any(record["event"] == event for record in run.records()):
                seen[event] = steps(run)
                return True
            time.sleep(0.02)
        return False

    def fill_and_empty() -> None:
        if wait_for("save"):
            ballast = small_disk / "ballast"
            fill(ballast, left)
            if left:
                wait_for("save_failed")
            else:
                seen["save_failed"] = steps(run)
                for _ in range(30):  # what the run removes meanwhile is filled again
                    time.sleep(0.1)
                    fill(ballast, left)
                seen["written"] = [run.last_step()]
            ballast.unlink()

    disturber = threading.Thread(target=fill_and_empty)
    disturber.start()
    last = 40 if left else 96
    done = run.train(f"train.steps={last}", *SETTINGS[1:], "checkpoint.every_steps=4", LARGER)
    disturber.join()
    assert done.returncode == 0, done.stderr
    if not left:
        assert done.stderr.index("was not written, the run goes on") < done.stderr.index(f"step {last}/")
        assert seen["written"][0] < last - 8, "the disk had room again before the run ended"
    failed = [record for record in run.records() if record["event"] == "save_failed"]
    assert failed and all("No space left on device" in record["reason"] for record in failed), done.stderr
    assert "the run goes on" in done.stderr
    assert seen["save_failed"], "the older checkpoints stayed"
    assert list(run.series("step", "loss")) == list(range(1, last + 1))
    assert steps(run) == [last, last - 4]
    assert all(checkpoint_damage(folder) is None for folder in committed_checkpoints(RunDir(run.folder)))
