"""Which checkpoints stay, and that the only sound one always does."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import pytest

from mf_scale.config.schema import CheckpointConfig
from mf_scale.rundir import MANIFEST, STATE, RunDir, checkpoint_step, committed_checkpoints, newest_sound_checkpoint
from mf_scale.training.leftovers import sweep
from mf_scale.training.retention import retain, surplus
from tests.unit.test_rundir import fence_of, make


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


def test_what_goes_goes_oldest_first_and_loses_its_name_first(run: RunDir) -> None:
    for step in range(1, 6):
        make(run, step)
    seen: list[list[int]] = []

    def between() -> None:
        seen.append(steps(run))

    removed = retain(run, fence_of(run), CheckpointConfig(keep_last=2), {5}, between)
    assert [checkpoint_step(folder) for folder in removed] == [1, 2, 3]
    assert seen == [[5, 4, 3, 2], [5, 4, 3], [5, 4]]
    assert steps(run) == [5, 4]


def test_a_removal_that_was_interrupted_is_swept_up(run: RunDir) -> None:
    for step in range(1, 4):
        make(run, step)

    def between() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retain(run, fence_of(run), CheckpointConfig(keep_last=2), {3}, between)
    assert steps(run) == [3, 2]
    assert sweep(run, fence_of(run, "def")) == [".removing-abc-step-00000001"]


@pytest.mark.parametrize("known", [set(), {5}])
def test_the_only_sound_one_is_never_removed(run: RunDir, known: set[int]) -> None:
    for step in range(1, 6):
        make(run, step)
    for step in (4, 5):
        (run.checkpoint(step) / "weights.safetensors").unlink()
    assert retain(run, fence_of(run), CheckpointConfig(keep_last=2), known, lambda: None) == []
    assert steps(run) == [5, 4, 3, 2, 1]
    assert newest_sound_checkpoint(run)[0] == run.checkpoint(3)


def test_altered_files_of_unknown_checkpoints_are_found_by_digest(run: RunDir) -> None:
    for step in range(1, 4):
        make(run, step)
    for step in (2, 3):
        (run.checkpoint(step) / "weights.safetensors").write_text("wEights")  # of the same size
    assert retain(run, fence_of(run), CheckpointConfig(keep_last=2), (), lambda: None) == []
    (run.checkpoint(2) / "weights.safetensors").write_text("weights")
    assert len(retain(run, fence_of(run), CheckpointConfig(keep_last=2), (), lambda: None)) == 1


def test_a_best_that_is_sound_is_enough(run: RunDir) -> None:
    for step in range(1, 6):
        make(run, step)
    for step in (4, 5):
        (run.checkpoint(step) / MANIFEST).write_text("{")
    (run.checkpoint(2) / STATE).write_text(json.dumps({"best": [2, 0.5]}))
    assert len(retain(run, fence_of(run), CheckpointConfig(keep_last=2), (), lambda: None)) == 2
    assert steps(run) == [5, 4, 2]


def call_best(run: RunDir, step: int, best: object) -> None:
    (run.checkpoint(step) / STATE).write_text(json.dumps({"best": best}))


def test_the_best_that_is_committed_stays_until_a_better_one_is_committed_too(run: RunDir) -> None:
    """Step 7 was the best and its save failed: what the states after it call the best is not there."""
    for step in (2, 4, 6, 8, 10):
        make(run, step)
    for step, best in ((2, None), (4, [4, 0.5]), (6, [4, 0.5]), (8, [7, 0.4]), (10, [7, 0.4])):
        call_best(run, step, best)
    retain(run, fence_of(run), CheckpointConfig(keep_last=2), (), lambda: None)
    assert steps(run) == [10, 8, 4]
    make(run, 12)
    call_best(run, 12, [12, 0.3])
    retain(run, fence_of(run), CheckpointConfig(keep_last=1), (), lambda: None)
    assert steps(run) == [12]


@pytest.mark.parametrize("state", ["{", "[]", '{"best": 3}', '{"best": []}', '{"best": ["x", 1]}', "{}"])
def test_a_state_that_cannot_be_read_is_nobodys_best(run: RunDir, state: str) -> None:
    for step in (1, 2, 3):
        make(run, step)
    call_best(run, 1, [1, 0.5])
    (run.checkpoint(2) / STATE).write_text(state)
    assert [
        checkpoint_step(f) for f in retain(run, fence_of(run), CheckpointConfig(keep_last=1), (), lambda: None)
    ] == [2]


def test_a_checkpoint_that_is_a_link_is_left_where_it_is(run: RunDir, tmp_path: Path) -> None:
    for step in range(1, 5):
        make(run, step)
    elsewhere = tmp_path / "elsewhere"
    run.checkpoint(1).rename(elsewhere)
    run.checkpoint(1).symlink_to(elsewhere)
    assert retain(run, fence_of(run), CheckpointConfig(keep_last=1), (), lambda: None) == [
        run.checkpoint(2),
        run.checkpoint(3),
    ]
    assert (elsewhere / MANIFEST).is_file() and steps(run) == [4, 1]
    (elsewhere / MANIFEST).unlink()
    (run.checkpoints / ".removing-step-00000009").symlink_to(elsewhere)
    assert sweep(run, fence_of(run)) == [] and elsewhere.is_dir() and run.checkpoint(1).is_symlink()
