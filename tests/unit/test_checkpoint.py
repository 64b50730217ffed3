"""The commit protocol: at no moment is there less than there was, and a failure leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mf_scale import faults
from mf_scale.distributed.env import World
from mf_scale.rundir import (
    LATEST,
    MANIFEST,
    WEIGHTS,
    RunDir,
    checkpoint_damage,
    committed_checkpoints,
    disk_errors,
    newest_sound_checkpoint,
    resolve_checkpoint,
)
from mf_scale.training import checkpoint
from mf_scale.training.checkpoint import begin, commit, point_latest, write_files
from mf_scale.training.fence import Fence
from mf_scale.training.leftovers import DAMAGED, set_aside, sweep
from mf_scale.training.snapshot import FileContents, live_files
from mf_scale.training.writer import Writer, attempt
from tests.unit.test_rundir import fence_of

ONE = World(0, 1, 0)
TEXTS = {"state.json": "{}", "vocabulary.json": '{"name": "ü"}'}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def save(run: RunDir, step: int, value: float = 1.0, *, fence: Fence | None = None) -> str | None:
    files, fence = live_files([FileContents(WEIGHTS, {"w": torch.full((4,), value)}, {})]), fence or fence_of(run)
    problem = begin(run, fence, step, ONE, None)
    written = attempt(lambda: write_files(run, fence, step, 0, files, TEXTS))
    return problem or commit(run, fence, step, ONE, written).problem


def names(run: RunDir) -> list[str]:
    return sorted(entry.name for entry in run.checkpoints.iterdir())


def test_a_commit_names_every_file_with_size_and_digest(run: RunDir) -> None:
    assert save(run, 8) is None
    assert names(run) == ["step-00000008"]
    folder = run.checkpoint(8)
    assert checkpoint_damage(folder) is None
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["format"], manifest["step"], manifest["world"]) == (2, 8, 1)
    assert manifest["files"].keys() == {WEIGHTS, *TEXTS} == {f.name for f in folder.iterdir()} - {MANIFEST}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


POINTS = ["save.part", "save.written", "save.manifest", "save.rename", "aside", "save.renamed"]


@pytest.mark.parametrize("point", POINTS)
def test_whenever_a_replacement_is_killed_a_sound_checkpoint_of_the_step_is_there(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    assert save(run, 4, 1.0) is None and save(run, 8, 1.0) is None

    def reach(here: str, **_: Any) -> None:
        if here == point:
            raise Killed

    monkeypatch.setattr(checkpoint.faults, "reach", reach)
    if point == "aside":
        rename = Path.rename

        def killed_between(self: Path, target: Path) -> None:
            if self.name.startswith(".writing-"):
                raise Killed
            rename(self, target)

        monkeypatch.setattr(Path, "rename", killed_between)
    with pytest.raises(Killed):
        save(run, 8, 2.0)
    monkeypatch.undo()
    folder, damaged = newest_sound_checkpoint(run)
    assert folder is not None and "00000008" in folder.name and not damaged
    assert len(committed_checkpoints(run)) == 2
    swept = sweep(run, fence_of(run, "def"))
    assert names(run) == ["step-00000004", "step-00000008"]
    assert (point == "save.renamed") or any(name.startswith(".writing-") for name in swept)
    assert newest_sound_checkpoint(run) == (run.checkpoint(8), {})
    from safetensors.torch import load_file

    replaced = load_file(run.checkpoint(8) / WEIGHTS)["w"][0] == 2.0
    assert replaced == (point == "save.renamed")


@pytest.mark.parametrize("point", ["save.part", "save.manifest", "save.rename"])
def test_a_full_disk_leaves_the_older_checkpoints_and_no_temporary_folder(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    assert save(run, 4, 1.0) is None
    monkeypatch.setenv(faults.VARIABLE, f"full {point}")
    for step in (4, 8):
        problem = save(run, step, 2.0)
        assert problem is not None and "Free some space" in problem
        assert names(run) == ["step-00000004"]
        assert checkpoint_damage(run.checkpoint(4)) is None
    monkeypatch.delenv(faults.VARIABLE)
    assert save(run, 8) is None


def test_a_name_that_cannot_be_taken_gives_the_old_one_back(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save(run, 4, 1.0) is None
    rename = Path.rename

    def refuse(self: Path, target: Path) -> None:
        if self.name.startswith(".writing-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert save(run, 4, 2.0) is not None
    assert names(run) == ["step-00000004"]


def test_one_ranks_trouble_is_everybodys(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"problem": None, "files": {"a": {"size": 1, "sha256": "0"}}}
    bad = {"problem": "cannot write: No space left on device. Free some space.", "files": None}
    begin(run, fence_of(run), 8, ONE, None)
    monkeypatch.setattr(checkpoint.comm, "gather_objects", lambda _: [fine, bad])
    done = commit(run, fence_of(run), 8, ONE, attempt(dict))
    assert done.problem is not None and done.problem.startswith("rank 1: cannot write") and done.bytes == 0
    assert names(run) == []
    monkeypatch.setattr(checkpoint.comm, "gather_objects", lambda _: [None, "no memory"])
    assert begin(run, fence_of(run), 8, ONE, None) == "rank 1: no memory"
    assert names(run) == [], "no folder is made that nobody would write into"
    monkeypatch.undo()
    begin(run, fence_of(run), 8, ONE, None)
    monkeypatch.setattr(checkpoint.comm, "gather_objects", lambda _: [fine, fine])
    assert commit(run, fence_of(run), 8, ONE, attempt(dict)).bytes == 1


def test_a_folder_that_cannot_be_made_is_a_problem_and_no_traceback(run: RunDir) -> None:
    run.path.mkdir()
    run.checkpoints.write_text("in the way")
    problem = begin(run, fence_of(run), 8, ONE, None)
    assert problem is not None and "cannot write" in problem


def test_latest_leads_to_the_newest_and_to_nothing_that_is_not_there(run: RunDir) -> None:
    for step in (4, 8):
        save(run, step)
        assert point_latest(run, fence_of(run)) is None
        assert (run.checkpoints / LATEST).readlink() == Path(run.checkpoint(step).name)
    assert resolve_checkpoint(str(run.checkpoints / LATEST))[0] == run.checkpoints.resolve().parent
    assert [folder.name for folder in committed_checkpoints(run)] == ["step-00000008", "step-00000004"]
    set_aside(run, fence_of(run), [run.checkpoint(8)], DAMAGED)
    assert point_latest(run, fence_of(run)) is None
    assert (run.checkpoints / LATEST).resolve() == run.checkpoint(4).resolve()
    shutil.rmtree(run.checkpoint(4))
    assert point_latest(run, fence_of(run)) is None
    assert names(run) == ["step-00000008.damaged"]


def test_a_file_system_without_links_is_a_sentence(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 4)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    sentence = point_latest(run, fence_of(run))
    assert sentence is not None and "Operation not permitted" in sentence
    assert names(run) == ["step-00000004"]


def test_the_writer_takes_one_job_at_a_time_and_keeps_its_outcome() -> None:
    import threading

    writer, go = Writer("test"), threading.Event()
    assert not writer.busy and not writer.ended
    writer.start(go.wait)
    assert writer.busy and not writer.ended
    with pytest.raises(RuntimeError, match="a second write"):
        writer.start(go.wait)
    go.set()
    writer.join(10)
    assert writer.ended
    with pytest.raises(RuntimeError, match="a second write"):
        writer.start(go.wait)
    assert writer.wait().result is True
    assert not writer.busy and not writer.ended

    def fails() -> None:
        raise ValueError("no")

    writer.start(fails)
    outcome = writer.wait()
    assert (outcome.result, outcome.problem) == (None, "ValueError: no")


@pytest.mark.parametrize("fails", ["temporary", "parent"])
def test_a_failing_fsync_before_the_rename_is_a_problem_and_after_it_none(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fsync(folder: Path) -> None:
        if (folder == run.checkpoints) == (fails == "parent"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "fsync_folder", fsync)
    problem = save(run, 8)
    assert (problem is None) == (fails == "parent") == ("step-00000008" in names(run))


def test_a_problem_of_a_save_does_not_speak_of_a_start(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "full save.part")
    said = str(save(run, 8))
    assert "No space left on device. Free some space" in said and "start" not in said
    monkeypatch.delenv(faults.VARIABLE)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # The manifest's own writing turns it into a UserError for a program that ends.
    monkeypatch.setattr(checkpoint, "write_atomically", lambda file, text: _through_disk_errors(file, refuse))
    said = str(save(run, 8))
    assert "No space left on device. Free some space" in said and "start" not in said


def _through_disk_errors(file: Path, refuse: Any) -> None:
    with disk_errors(file):
        refuse()
