"""A start that another one has taken the run over from: whatever it was doing, it changes nothing any more."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mf_scale.distributed.env import World
from mf_scale.errors import EXIT_GUARD, FaultError, UserError
from mf_scale.rundir import CONFIG, LATEST, WEIGHTS, RunDir, checkpoint_damage, checkpoint_step, committed_checkpoints
from mf_scale.training import checkpoint, fence
from mf_scale.training.checkpoint import begin, commit, point_latest
from mf_scale.training.fence import LOCK, Fence, FencedError
from mf_scale.training.leftovers import ABANDONED, set_aside, sweep, sweep_aside, take_out
from mf_scale.training.writer import attempt
from tests.unit.test_checkpoint import save
from tests.unit.test_rundir import fence_of, make

ONE = World(0, 1, 0)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def contents(run: RunDir) -> dict[str, str]:
    return {
        str(path.relative_to(run.path)): (
            str(path.readlink()) if path.is_symlink() else path.read_text("latin1") if path.is_file() else ""
        )
        for path in sorted(run.path.rglob("*"))
    }


def steps(run: RunDir) -> list[int]:
    return [checkpoint_step(folder) for folder in committed_checkpoints(run)]


class Other:
    """Another start, which takes the run over when it is called, and may save a step; it is called once.

    Or has taken the lock only, and sweeps later.
    """

    def __init__(self, run: RunDir, step: int | None = None, *, sweeps: bool = True) -> None:
        self.run, self.step, self.sweeps = run, step, sweeps
        self.left: dict[str, str] | None = None

    def __call__(self) -> None:
        if self.left is not None:
            return
        self.left = {}
        taken = fence_of(self.run, "def")
        if self.sweeps:
            sweep(self.run, taken)
            point_latest(self.run, taken)
        if self.step is not None:
            make(self.run, self.step, "of the other start")
        self.left = contents(self.run)


def test_the_token_decides(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = fence_of(run)
    mine.check()
    for text in ("4711 node2 def 12 3 2\n", "4711 node2 abcd 12 3 2\n", "4711 abc\n"):
        (run.path / LOCK).write_text(text)
        with pytest.raises(FencedError) as caught:
            mine.check()
        assert caught.value.exit_code == EXIT_GUARD
    (run.path / LOCK).write_text("4711 node2 def 12 3 2\n")
    with pytest.raises(FencedError, match=r"another start of this run \(job 12, restart 3, on node2\) has taken over"):
        mine.check()
    (run.path / LOCK).write_text("4711 node2 def - 0 2\n")
    with pytest.raises(FencedError, match=r"\(pid 4711 on node2\)"):
        mine.check()


@pytest.mark.parametrize("gone", ["lock", "folder", "a file in its place"])
def test_a_run_directory_that_is_gone_is_somebody_elses(run: RunDir, gone: str) -> None:
    mine = fence_of(run)
    (run.path / LOCK).unlink()
    if gone != "lock":
        run.path.rmdir()
    if gone == "a file in its place":
        run.path.write_text("")
    with pytest.raises(FencedError, match="is gone"):
        mine.check()


def test_a_lock_that_cannot_be_read_once_is_read_again_and_then_a_fault(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, failures, read = fence_of(run), [1], Path.read_text
    monkeypatch.setattr(fence, "_AGAIN_SECONDS", 0.0)

    def stumbles(path: Path, **options: Any) -> str:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", stumbles)
    mine.check()
    failures[0] = 2
    with pytest.raises(FaultError, match="Stale file handle"):
        mine.check()


POINTS = ["save.part", "save.written", "save.manifest", "save.rename", "save.checked"]


@pytest.mark.parametrize("also", [None, 8], ids=["it has saved nothing", "it has saved the same step"])
@pytest.mark.parametrize("point", POINTS)
def test_a_save_during_which_another_start_takes_over_changes_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, point: str, also: int | None
) -> None:
    assert save(run, 4) is None
    other, mine = Other(run, also), Fence(run.path / LOCK, "abc")
    monkeypatch.setattr(checkpoint.faults, "reach", lambda here, **_: other() if here == point else None)
    with pytest.raises(FencedError, match="has taken over"):
        save(run, 8, fence=mine)
    assert contents(run) == other.left
    assert steps(run) == ([4] if also is None else [8, 4])
    if also is not None:
        assert (run.checkpoint(8) / WEIGHTS).read_text() == "of the other start"


@pytest.mark.parametrize("point", ["save.manifest", "save.rename"])
def test_a_start_that_has_the_lock_need_not_have_swept_yet(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    assert save(run, 4) is None
    other, mine, manifests = Other(run, sweeps=False), Fence(run.path / LOCK, "abc"), list[Path]()
    write = checkpoint.write_atomically

    def counted(file: Path, text: str) -> None:
        manifests.append(file)
        write(file, text)

    monkeypatch.setattr(checkpoint, "write_atomically", counted)
    monkeypatch.setattr(checkpoint.faults, "reach", lambda here, **_: other() if here == point else None)
    with pytest.raises(FencedError):
        save(run, 8, fence=mine)
    assert bool(manifests) == (point == "save.rename")
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["step-00000004"]


def test_what_was_renamed_before_counts(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    other, mine = Other(run), fence_of(run)
    monkeypatch.setattr(checkpoint.faults, "reach", lambda here, **_: other() if here == "save.renamed" else None)
    assert save(run, 8, fence=mine) is None
    assert steps(run) == [8] and checkpoint_damage(run.checkpoint(8)) is None
    before = contents(run)
    assert point_latest(run, mine) is None and contents(run) == before, "it leads there already"
    with pytest.raises(FencedError):
        begin(run, mine, 10, ONE, None)
    assert contents(run) == before


@pytest.mark.parametrize("moment", ["before the old one stands aside", "before the new one takes its name"])
def test_a_replacement_during_which_another_start_takes_over_leaves_the_old_one(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    assert save(run, 8, 1.0) is None
    other, mine, rename = Other(run), Fence(run.path / LOCK, "abc"), Path.rename
    first = moment.startswith("before the old")

    def between(path: Path, target: Path) -> Path:
        if path.name == "step-00000008" if first else path.name.startswith(".writing-abc-"):
            other()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", between)
    with pytest.raises(FencedError):
        save(run, 8, 2.0, fence=mine)
    monkeypatch.undo()
    assert contents(run) == other.left
    assert load_file(run.checkpoint(8) / WEIGHTS)["w"][0] == 1.0 and checkpoint_damage(run.checkpoint(8)) is None


def test_a_folder_made_in_the_moment_of_the_takeover_goes_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save(run, 4) is None
    other, mine, mkdir = Other(run), Fence(run.path / LOCK, "abc"), Path.mkdir

    def late(path: Path, *arguments: Any, **options: Any) -> None:
        other()
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    with pytest.raises(FencedError):
        begin(run, mine, 8, ONE, None)
    assert contents(run) == other.left


def test_a_failing_write_of_a_start_that_was_cut_off_is_no_matter_of_the_disk(run: RunDir) -> None:
    mine = fence_of(run)
    begin(run, mine, 8, ONE, None)
    other = Other(run)
    other()
    written = attempt(lambda: (_ for _ in ()).throw(OSError(errno.ENOENT, "gone")))
    with pytest.raises(FencedError):
        commit(run, mine, 8, ONE, written)
    assert contents(run) == other.left


ACTIONS: dict[str, Callable[[RunDir, Fence], Any]] = {
    "take out": lambda run, mine: take_out(run, mine, run.checkpoint(4)),
    "set aside": lambda run, mine: set_aside(run, mine, [run.checkpoint(8)], ABANDONED),
    "sweep": sweep,
    "write": lambda run, mine: mine.write(run.config, "seed: 1"),
    "point": point_latest,
}


@pytest.mark.parametrize("passed", [0, 1, 2])
@pytest.mark.parametrize("action", ACTIONS)
def test_nothing_is_moved_or_written_whenever_another_start_takes_over(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, action: str, passed: int
) -> None:
    """It comes right after as many of the action's checks have passed."""
    for step in (4, 8):
        make(run, step)
    (run.checkpoints / ".writing-older-step-00000006").mkdir()
    (run.path / f".{CONFIG}.4711").write_text("")
    (run.checkpoints / LATEST).symlink_to("step-00000004")
    # Before it has swept, the lock alone must do.
    other, mine, check, checks = Other(run, sweeps=passed > 0), fence_of(run), Fence.check, [0]

    def counted(fence: Fence) -> None:
        check(fence)
        checks[0] += fence.token == "abc"
        if checks[0] == passed:
            other()

    if passed == 0:
        other()
    monkeypatch.setattr(Fence, "check", counted)
    with suppress(UserError, OSError):
        ACTIONS[action](run, mine)
    if other.left is None:  # the action has fewer checks
        assert checks[0] < passed
        return
    assert contents(run) == other.left


def test_older_ones_that_were_set_aside_are_left_to_the_other_start(run: RunDir) -> None:
    mine = fence_of(run)
    set_aside(run, mine, [make(run, step) for step in (2, 6)], ABANDONED)
    Other(run)()
    with pytest.raises(FencedError):
        sweep_aside(run, mine)
    assert len(list(run.checkpoints.glob(f"*.{ABANDONED}"))) == 2
