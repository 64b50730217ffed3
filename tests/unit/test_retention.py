"""Which checkpoints stay, and that the only sound one always does."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from mf_scale.config.schema import CheckpointConfig
from mf_scale.rundir import MANIFEST, RunDir, checkpoint_step, committed_checkpoints, newest_sound_checkpoint
from mf_scale.training.checkpoint import sweep
from mf_scale.training.retention import retain, surplus
from tests.unit.test_rundir import make


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def steps(run: RunDir) -> list[int]:
    return [checkpoint_step(folder) for folder in committed_checkpoints(run)]


def kept(config: CheckpointConfig, best: int | None, several: Collection[int] = range(0, 110, 10)) -> set[int]:
    return set(several) - set(surplus(several, config, best))


def test_the_newest_the_multiples_and_the_best_stay() -> None:
    assert kept(CheckpointConfig(keep_last=2), None) == {90, 100}
    assert kept(CheckpointConfig(keep_last=2, keep_every=40), None) == {0, 40, 80, 90, 100}
    assert kept(CheckpointConfig(keep_last=2), 30) == {30, 90, 100}
    assert kept(CheckpointConfig(keep_last=2, keep_best=False), 30) == {90, 100}
    assert kept(CheckpointConfig(keep_last=3), 95) == {80, 90, 100}
    assert kept(CheckpointConfig(keep_last=3), None, [7]) == {7}
    assert surplus([3, 1, 2], CheckpointConfig(keep_last=1), None) == [1, 2]


def test_what_goes_goes_oldest_first_and_loses_its_manifest_first(run: RunDir) -> None:
    for step in range(1, 6):
        make(run, step)
    seen: list[list[int]] = []

    def between() -> None:
        seen.append(steps(run))

    removed = retain(run, CheckpointConfig(keep_last=2), None, {5}, between)
    assert [checkpoint_step(folder) for folder in removed] == [1, 2, 3]
    assert seen == [[5, 4, 3, 2], [5, 4, 3], [5, 4]]
    assert steps(run) == [5, 4]


def test_a_removal_that_was_interrupted_is_swept_up(run: RunDir) -> None:
    for step in range(1, 4):
        make(run, step)

    def between() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retain(run, CheckpointConfig(keep_last=2), None, {3}, between)
    assert steps(run) == [3, 2]
    assert sweep(run) == ["step-00000001"]


@pytest.mark.parametrize("known", [set(), {5}])
def test_the_only_sound_one_is_never_removed(run: RunDir, known: set[int]) -> None:
    for step in range(1, 6):
        make(run, step)
    for step in (4, 5):
        (run.checkpoint(step) / "weights.safetensors").unlink()
    assert retain(run, CheckpointConfig(keep_last=2), None, known, lambda: None) == []
    assert steps(run) == [5, 4, 3, 2, 1]
    assert newest_sound_checkpoint(run)[0] == run.checkpoint(3)


def test_altered_files_of_unknown_checkpoints_are_found_by_digest(run: RunDir) -> None:
    for step in range(1, 4):
        make(run, step)
    for step in (2, 3):
        (run.checkpoint(step) / "weights.safetensors").write_text("wEights")  # of the same size
    assert retain(run, CheckpointConfig(keep_last=2), None, (), lambda: None) == []
    (run.checkpoint(2) / "weights.safetensors").write_text("weights")
    assert len(retain(run, CheckpointConfig(keep_last=2), None, (), lambda: None)) == 1


def test_a_best_that_is_sound_is_enough(run: RunDir) -> None:
    for step in range(1, 6):
        make(run, step)
    for step in (4, 5):
        (run.checkpoint(step) / MANIFEST).write_text("{")
    assert len(retain(run, CheckpointConfig(keep_last=2), 2, (), lambda: None)) == 2
    assert steps(run) == [5, 4, 2]
