"""The run directory: a checkpoint counts only when it is whole."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mf_scale import rundir
from mf_scale.errors import UserError
from mf_scale.rundir import (
    FORMAT,
    LATEST,
    MANIFEST,
    RunDir,
    checkpoint_damage,
    committed_checkpoints,
    file_digest,
    newest_sound_checkpoint,
    resolve_checkpoint,
)
from mf_scale.training.fence import LOCK, Fence
from mf_scale.training.leftovers import ABANDONED, DAMAGED, set_aside, sweep, sweep_aside, without_manifest


def make(run: RunDir, step: int, text: str = "weights") -> Path:
    folder = run.checkpoint(step)
    folder.mkdir(parents=True)
    file = folder / "weights.safetensors"
    file.write_text(text)
    entry = {"size": file.stat().st_size, "sha256": file_digest(file)}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": {file.name: entry}}))
    return folder


def fence_of(run: RunDir, token: str = "abc") -> Fence:
    """The fence of a start that has just taken the run."""
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / LOCK).write_text(f"4711 node1 {token} - 0 1\n")
    return Fence(run.path / LOCK, token)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_newest_first_and_half_written_never(run: RunDir) -> None:
    make(run, 9), make(run, 10)
    (run.checkpoints / "best").mkdir()  # somebody's own: not ours to touch
    (run.checkpoint(11)).mkdir()
    (run.checkpoints / ".writing-step-00000012").mkdir()
    assert [f.name for f in committed_checkpoints(run)] == ["step-00000010", "step-00000009"]
    (run.checkpoints / ".removing-step-00000008").mkdir()
    (run.checkpoints / ".latest.4711").symlink_to("step-00000009")
    (run.path / ".config.yaml.4711").write_text("")
    swept = [".config.yaml.4711", ".latest.4711", ".removing-step-00000008", ".writing-step-00000012"]
    assert sorted(sweep(run, fence_of(run))) == swept
    assert without_manifest(run) == ["step-00000011"], "somebody may still want its files"
    left = ["best", "step-00000009", "step-00000010", "step-00000011"]
    assert sorted(f.name for f in run.checkpoints.iterdir()) == left
    assert sorted(f.name for f in run.path.iterdir()) == [LOCK, "checkpoints"]


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "manifest"])
def test_damage_is_found_and_walked_back_from(run: RunDir, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = make(run, 1), make(run, 2)
    file = newer / "weights.safetensors"
    if harm == "truncated":
        file.write_text("weight")
    elif harm == "flipped":
        file.write_text("weighty"[:6] + "S")
    elif harm == "missing":
        file.unlink()
    else:
        (newer / MANIFEST).write_text("{")
    assert checkpoint_damage(newer)
    folder, damaged = newest_sound_checkpoint(run)
    assert folder == older
    assert len(damaged) == 1
    assert str(newer) in damaged[newer]
    assert resolve_checkpoint(str(run.path)) == (run.path, older)
    assert "is damaged" in caplog.text
    set_aside(run, fence_of(run), damaged, DAMAGED)
    assert [f.name for f in committed_checkpoints(run)] == ["step-00000001"]


def test_a_manifest_cannot_name_a_file_outside(run: RunDir) -> None:
    folder = make(run, 1)
    (run.path / "secret").write_text("x")
    (folder / MANIFEST).write_text(
        json.dumps({"format": FORMAT, "files": {"../../secret": {"size": 1, "sha256": "0"}}})
    )
    assert checkpoint_damage(folder) == "secret is missing"


def test_nothing_to_load_says_so(run: RunDir) -> None:
    with pytest.raises(UserError, match="neither a run directory"):
        resolve_checkpoint(str(run.path))
    run.path.mkdir()
    with pytest.raises(UserError, match="no committed checkpoint"):
        resolve_checkpoint(str(run.path))


def altered(folder: Path, **changes: Any) -> Path:
    """The checkpoint with other values in its manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    return folder


def test_only_what_the_manifest_vouches_for_is_a_checkpoint(run: RunDir) -> None:
    assert checkpoint_damage(make(run, 1)) is None
    assert "format is 1" in str(checkpoint_damage(altered(make(run, 2), format=1)))
    assert "does not name weights.safetensors" in str(checkpoint_damage(altered(make(run, 3), files={})))
    folder = make(run, 4)
    (folder / "notes.txt").write_text("somebody's own")
    assert checkpoint_damage(folder) is None
    (folder / "partition-00000-of-00001.safetensors").write_text("smuggled in")
    assert checkpoint_damage(folder) == "partition-00000-of-00001.safetensors is not in its manifest"


HOSTILE = [
    "[" * 100_000,
    '{"format": 2, "files": {"weights.safetensors": {"size": Infinity, "sha256": "0"}}}',
    '{"format": 2, "files": {"weights.safetensors": {"size": NaN, "sha256": "0"}}}',
    '{"format": 2, "files": {"weights.safetensors": {"size": [1], "sha256": "0"}}}',
    '{"format": 2, "files": {"weights.safetensors": []}}',
    '{"format": 2, "files": ["weights.safetensors"]}',
    '{"format": 2}',
    '{"files": {}}',
    "[]",
]


@pytest.mark.parametrize("manifest", HOSTILE)
def test_a_manifest_that_somebody_made_up_is_damage(run: RunDir, manifest: str) -> None:
    folder = make(run, 1)
    (folder / MANIFEST).write_text(manifest)
    assert "its manifest cannot be read" in str(checkpoint_damage(folder))


def test_a_name_that_no_file_has_is_damage(run: RunDir) -> None:
    folder = altered(make(run, 1), files={"a\0b": {"size": 1, "sha256": "0"}})
    assert checkpoint_damage(folder)


def test_a_disk_that_stumbles_once_costs_no_checkpoint_and_one_that_fails_is_named(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, failures, digest = make(run, 1), [1], file_digest

    def stumbles(file: Path) -> str:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(file)

    monkeypatch.setattr(rundir, "file_digest", stumbles)
    monkeypatch.setattr(rundir, "_SECOND_TRY_SECONDS", 0.0)
    assert checkpoint_damage(folder) is None and failures == [0]
    failures[0] = 2
    assert "'weights.safetensors' cannot be read ([Errno 5]" in str(checkpoint_damage(folder))


def test_what_the_link_leads_to_is_decided_once(run: RunDir) -> None:
    make(run, 1), make(run, 2)
    link = run.checkpoints / LATEST
    link.symlink_to("step-00000001")
    found = resolve_checkpoint(str(link))
    link.unlink()
    link.symlink_to("step-00000002")
    assert found == (run.path.resolve(), run.checkpoint(1).resolve())


@pytest.mark.parametrize("why", [DAMAGED, ABANDONED])
def test_of_those_set_aside_by_earlier_starts_the_newest_stays(run: RunDir, why: str) -> None:
    set_aside(run, fence_of(run), [make(run, step) for step in (2, 10, 6)], why)
    (run.checkpoints / f"mine.{why}").mkdir()
    assert committed_checkpoints(run) == []
    assert sweep_aside(run, fence_of(run)) == [f"step-00000002.{why}", f"step-00000006.{why}"]
    assert sorted(f.name for f in run.checkpoints.iterdir()) == [f"mine.{why}", f"step-00000010.{why}"]


def refusing_fsync(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(rundir.os, "fsync", refuse)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_without_fsync_of_folders_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    refusing_fsync(monkeypatch, error)
    rundir.fsync_folder(tmp_path)


def test_a_disk_that_fails_at_fsync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing_fsync(monkeypatch, errno.EIO)
    with pytest.raises(OSError):
        rundir.fsync_folder(tmp_path)


def test_a_small_file_that_cannot_take_its_name_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(UserError, match=r"cannot write.*config\.yaml"):
        rundir.write_atomically(tmp_path / "config.yaml", "seed: 1")
