"""The run directory: a checkpoint counts only when it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mf_scale.errors import UserError
from mf_scale.rundir import (
    MANIFEST,
    RunDir,
    checkpoint_damage,
    committed_checkpoints,
    file_digest,
    newest_sound_checkpoint,
    resolve_checkpoint,
)
from mf_scale.training.checkpoint import set_aside, sweep


def make(run: RunDir, step: int, text: str = "weights") -> Path:
    folder = run.checkpoint(step)
    folder.mkdir(parents=True)
    file = folder / "weights.safetensors"
    file.write_text(text)
    entry = {"size": file.stat().st_size, "sha256": file_digest(file)}
    (folder / MANIFEST).write_text(json.dumps({"files": {file.name: entry}}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_newest_first_and_half_written_never(run: RunDir) -> None:
    make(run, 9), make(run, 10)
    (run.checkpoints / "best").mkdir()  # somebody's own: not ours to touch
    (run.checkpoint(11)).mkdir()
    (run.checkpoints / ".writing-step-00000012").mkdir()
    assert [f.name for f in committed_checkpoints(run)] == ["step-00000010", "step-00000009"]
    assert sorted(sweep(run)) == [".writing-step-00000012", "step-00000011"]
    assert sorted(f.name for f in run.checkpoints.iterdir()) == ["best", "latest", "step-00000009", "step-00000010"]


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
    set_aside(damaged)
    assert [f.name for f in committed_checkpoints(run)] == ["step-00000001"]


def test_a_manifest_cannot_name_a_file_outside(run: RunDir) -> None:
    folder = make(run, 1)
    (run.path / "secret").write_text("x")
    (folder / MANIFEST).write_text(json.dumps({"files": {"../../secret": {"size": 1, "sha256": "0"}}}))
    assert checkpoint_damage(folder) == "secret is missing"


def test_nothing_to_load_says_so(run: RunDir) -> None:
    with pytest.raises(UserError, match="neither a run directory"):
        resolve_checkpoint(str(run.path))
    run.path.mkdir()
    with pytest.raises(UserError, match="no committed checkpoint"):
        resolve_checkpoint(str(run.path))
