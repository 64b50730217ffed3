"""Two sources and repeated images, killed and gone on with in other layouts: the samples are the undisturbed run's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.program import Run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

STEPS = 12


class SeveralSources(Run):
    """A run on the training and the validation images, two to one."""

    def __init__(self, folder: Path, packed: Path) -> None:
        super().__init__(folder, packed)
        listed = f"[{{index: {packed}/train, weight: 2}}, {{index: {packed}/val, weight: 1}}]"
        self.sources = [
            f"data.sources={listed}",
            "data.repeat_threshold=0.2",
            "data.block_samples=8",
            "train.global_batch=12",
            "checkpoint.every_steps=3",
            "tracking.wandb=disabled",
            f"train.steps={STEPS}",
            f"run_dir={folder}",
        ]

    def keys(self) -> dict[int, list[str]]:
        return {step: sorted(keys) for step, keys in self.series("keys", "keys").items()}

    def ask(self, part: str, *arguments: str) -> Any:
        """What `mf-scale data` says, as JSON."""
        command = [sys.executable, "-m", "mf_scale.cli", "data", part, str(self.folder), "--json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> SeveralSources:
    run = SeveralSources(tmp_path_factory.mktemp("elastic") / "whole", packed)
    done = run.train(processes=1)
    assert done.returncode == 0, done.stderr
    assert "8 samples of every global batch" in done.stderr and "an epoch with repeats" in done.stderr
    return run


def test_other_ranks_workers_and_micro_batches_after_a_kill_read_the_same(tmp_path, packed, whole):
    run = SeveralSources(tmp_path / "killed", packed)
    killed = run.train("data.workers=3", processes=2, MF_SCALE_FAULT="kill train.step rank=1 step=5")
    assert killed.returncode == 137, killed.stderr
    stopped = run.train(
        "data.workers=0", "train.micro_batch=4", processes=3, MF_SCALE_FAULT="stop train.step rank=2 step=8"
    )
    assert stopped.returncode == 85, stopped.stderr
    done = run.train("data.workers=2", processes=1)
    assert done.returncode == 0, done.stderr
    assert run.keys() == whole.keys() and list(run.keys()) == list(range(1, STEPS + 1))


def test_the_samples_of_a_step_can_be_asked_for(whole, packed):
    """Also of a step to come, and of a run that nobody has started."""
    for step in (1, 7, STEPS):
        told = whole.ask("samples", "--step", str(step))["samples"]
        assert [sample["lane"] for sample in told] == list(range(12))
        assert sorted(sample["key"] for sample in told) == whole.keys()[step]
        assert [Path(sample["source"]).name for sample in told] == ["train"] * 8 + ["val"] * 4
    config = whole.folder / "config.yaml"
    command = [sys.executable, "-m", "mf_scale.cli", "data", "samples", str(config), "--step", "7"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(key in text for key in whole.keys()[7]) and "step 7 takes 12 samples" in text


def test_where_the_sources_stand_can_be_asked_for(whole):
    told = whole.ask("position")
    assert told["step"] == STEPS
    for source, count in zip(told["sources"], (8, 4), strict=True):
        assert source["in_batch"] == count and source["taken"] == STEPS * count
        assert source["epoch"] * source["length"] + source["offset"] == source["taken"]
        assert source["length"] > {8: 40, 4: 13}[count]
    assert whole.ask("position", "--step", "1")["sources"][0]["taken"] == 8


def test_a_repeated_image_comes_more_often(whole):
    """Over three epochs of the small source its images come unequally often, each at least three times."""
    source = whole.ask("position")["sources"][1]
    steps = -(-3 * source["length"] // source["in_batch"])
    keys = [
        sample["key"]
        for step in range(1, min(steps, STEPS) + 1)
        for sample in whole.ask("samples", "--step", str(step))["samples"]
        if sample["lane"] >= 8 and sample["epoch"] < 3
    ]
    assert len(set(map(keys.count, keys))) > 1


def test_a_weight_that_gives_a_source_nothing_is_refused(tmp_path, packed):
    run = SeveralSources(tmp_path / "tiny", packed)
    done = run.train(f"data.sources=[{{index: {packed}/train, weight: 50}}, {{index: {packed}/val}}]", processes=1)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "no sample of source 1" in done.stderr and "smallest global batch that holds one of each is 26" in done.stderr
    )
    both = run.train(f"data.train={packed}/train", processes=1)
    assert both.returncode == 2 and "put all of them into data.sources" in both.stderr
