"""The doctor on a real run: what it foretells is what a start does, and broken situations are named, all at once."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mf_scale.cli import main
from mf_scale.data.index import HEAD, head_digest
from mf_scale.doctor import checkpoint, examination, node
from mf_scale.doctor.node import host_name
from mf_scale.doctor.run_directory import directory_facts
from mf_scale.doctor.watch import Watch
from tests.conftest import ROOT
from tests.integration.program import SMALL, Run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Run:
    """A run of two ranks that ended at step 4."""
    run = Run(tmp_path_factory.mktemp("doctor") / "run", packed)
    done = run.train("train.steps=4")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(autouse=True)
def little_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "directory_facts", partial(directory_facts, most=1 << 20))


def words(sources: list[str], *more: str) -> list[str]:
    return ["doctor", str(ROOT / "configs/base.yaml"), *SMALL, *sources, *more, "--json"]


def examined(capsys: pytest.CaptureFixture[str], sources: list[str], *more: str) -> dict[str, Any]:
    """What one rank says, in this process."""
    code = main([*words(sources, *more), "--processes", "1"])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == code
    return told


def of(told: dict[str, Any], check: str) -> dict[str, Any]:
    """The one finding of a check."""
    (found,) = [finding for finding in told["findings"] if finding["check"] == check]
    return dict(found)


def copy_of(run: Run, folder: Path) -> Run:
    shutil.copytree(run.folder, folder, symlinks=True)
    copied = Run(folder, Path())
    copied.sources = [*run.sources[:2], f"run_dir={folder}"]
    return copied


def test_it_foretells_what_a_start_would_do(trained: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = sorted(path.name for path in trained.folder.iterdir())
    told = examined(capsys, trained.sources, "train.steps=8")
    assert told["problems"] == 0, told
    assert "goes on at step 4 of 8, written by 2 ranks and read by 1; " in of(told, "start")["text"]
    assert "tensors and the vocabulary fit" in of(told, "start")["text"]
    folder = trained.folder / "checkpoints/step-00000004"
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert of(told, "room")["details"]["checkpoint_bytes"] == pytest.approx(there, rel=0.02)
    assert of(told, "room")["details"]["held"] == pytest.approx(there, rel=0.02)
    assert sorted(path.name for path in trained.folder.iterdir()) == before, "it leaves nothing behind"

    over = examined(capsys, trained.sources, "train.steps=4")
    assert over["exit_code"] == 0 and "a start would end at once" in of(over, "start")["text"]
    order = examined(capsys, trained.sources, "train.steps=8", "data.shuffle=full")
    assert "the order of the data changes" in of(order, "start")["text"] and order["exit_code"] == 0
    new = [*trained.sources[:2], f"run_dir={tmp_path}/new"]
    assert "all weights random" in of(examined(capsys, new, "train.steps=4"), "start")["text"]
    given = examined(capsys, new, "train.steps=4", f"train.init_from={trained.folder}")
    assert "begins at step 0 with the weights of" in of(given, "start")["text"] and given["exit_code"] == 0


def test_every_problem_is_told_at_once(
    trained: Run, packed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = str(shutil.copytree(packed / "val", tmp_path / "other"))
    head = json.loads((tmp_path / "other" / HEAD).read_text())
    head["vocabulary"]["classes"][0]["name"] = "somebody"
    head["digest"] = head_digest(head)
    (tmp_path / "other" / HEAD).write_text(json.dumps(head))
    shard = next(Path(source).glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    told = examined(
        capsys,
        [f"data.train={source}", f"data.val={packed}/val", trained.sources[2]],
        *("train.global_batch=7", "--ranks", "4", "model.decoder.width=64", "model.decoder.heads=5", "train.steps=8"),
    )
    assert told["exit_code"] == 1
    said = {finding["check"]: finding for finding in told["findings"] if finding["level"] == "problem"}
    assert set(said) >= {"configuration", "shards", "labels", "batch", "model", "checkpoint"}, said
    assert "model.decoder.width = 64 is not a multiple" in said["configuration"]["text"]
    assert "1 of 2 shards differ from the index" in said["shards"]["text"] and "instead of" in said["shards"]["text"]
    assert "the source has vocabulary 'coco_panoptic_133'" in said["labels"]["text"]
    assert "the first class that differs is 'person'" in said["labels"]["text"]
    assert "cannot be shared by 4 ranks" in said["batch"]["text"]
    assert "the first class that differs is 'person'" in said["checkpoint"]["text"]
    assert all(finding["remedy"] for finding in said.values()) and not any(f["fault"] for f in said.values())


def test_a_checkpoint_that_does_not_fit_or_is_damaged_or_in_use_is_named(
    trained: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = examined(capsys, trained.sources, "train.steps=8", "model.decoder.width=64")
    found = of(wide, "checkpoint")
    assert wide["exit_code"] == 1 and "do not fit the model" in found["text"] and " there and [64" in found["text"]

    with (trained.folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        busy = examined(capsys, trained.sources, "train.steps=8")
    assert "another process is training in this run directory" in of(busy, "checkpoint")["text"]
    lost = copy_of(trained, tmp_path / "lost")
    (lost.folder / ".lock").write_text("4711 node1 abc 77 0 1\n")
    with (lost.folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(checkpoint, "still_known", lambda job: job != "77")
        assert examined(capsys, lost.sources, "train.steps=8")["exit_code"] == 0, "a start takes over from a lost job"

    damaged = copy_of(trained, tmp_path / "damaged")
    weights = damaged.folder / "checkpoints/step-00000004/weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    told = examined(capsys, damaged.sources, "train.steps=8")
    assert "no checkpoint of this run is sound: step-00000004: weights.safetensors was altered" in str(told)

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("mine: 1\n")
    theirs = examined(capsys, [*trained.sources[:2], f"run_dir={foreign}"], "train.steps=8")
    assert "no run of this program left there" in of(theirs, "checkpoint")["text"]

    away = examined(capsys, [f"data.train={tmp_path}/gone", trained.sources[2]], "train.steps=8")
    assert "there is no index of shards here" in of(away, "shards")["text"] and away["exit_code"] == 1


def test_every_source_is_opened_for_itself(
    trained: Run, packed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cut = Path(shutil.copytree(packed / "train", tmp_path / "cut"))
    shard = next(cut.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    named = [f"{tmp_path}/gone", str(cut), str(packed / "train"), f"{tmp_path}/away"]
    sources = f"data.sources=[{','.join(f'{{index: {name}}}' for name in named)}]"
    told = examined(capsys, [sources, f"data.val={tmp_path}/empty", trained.sources[2]], "train.steps=8")
    said = [finding["text"] for finding in told["findings"] if finding["check"] == "shards"]
    for name in ("gone", "away", "empty"):
        assert f"there is no index of shards here ({tmp_path}/{name}/index.json)" in said
    assert any("two training sources are the same" in text for text in said)
    assert any("shards differ from the index" in text and shard.name in text for text in said)
    assert len(said) == 5 == told["problems"] and told["exit_code"] == 1, told
    assert of(told, "model")["level"] == "ok", "its classes are those of a source that opens"


@pytest.mark.parametrize(("stage", "in_job"), [("the kernels", False), ("the checkpoints", False), ("W&B", True)])
def test_what_was_found_before_the_time_ran_out_is_told(
    stage: str, in_job: bool, trained: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Watch):
        """The time is over at `stage`."""

        def __init__(self, _: float, overdue: Callable[[str], None], *, began: float) -> None:
            super().__init__(600, overdue)
            self.overdue = overdue

        @contextmanager
        def at(self, now: str) -> Iterator[None]:
            if now == stage:
                self.end()
                self.overdue(now)
            with super().at(now):
                yield

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(examination, "Watch", Late)
    monkeypatch.setattr(examination.os, "_exit", end)
    more = ["--in-job"] if in_job else []
    with pytest.raises(SystemExit) as ended:
        main([*words(trained.sources, "train.steps=8", *more), "--processes", "1"])
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == told["exit_code"] == (0 if in_job else 1)
    assert told["hosts"] == [host_name()] and of(told, "doctor")["level"] == ("warning" if in_job else "problem")
    assert f"{stage} did not come to an end within 60 s" in of(told, "doctor")["text"]
    found = {finding["check"] for finding in told["findings"] if finding["level"] == "ok"}
    assert found >= {"versions", "open files", "host memory"}, found
    assert ("shards" in found) == (stage != "the kernels") and ("labels" in str(told)) == (stage == "the checkpoints")
    assert "start" not in found and "gpus" not in found and told["problems"] == (not in_job)


def test_a_wrong_command_line_and_a_configuration_that_cannot_be_read_are_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["doctor", str(tmp_path / "none.yaml")]) == 2
    assert main(["doctor", "train.steps=3"]) == 2
    assert main(["doctor", str(ROOT / "configs/base.yaml"), "train.stps=3"]) == 2
    assert "Did you mean train.steps?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--nonsense"])


def processes(trained: Run, fault: str, *more: str) -> tuple[int, dict[str, Any]]:
    """Two ranks of this machine: exit code, and what was told."""
    done = subprocess.run(
        [sys.executable, "-m", "mf_scale.cli", *words(trained.sources, "train.steps=8", *more), "--processes", "2"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "MF_SCALE_FAULT": fault, "OMP_NUM_THREADS": "1"},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_ranks_measure_each_other_and_one_that_is_late_is_named(trained: Run) -> None:
    code, told = processes(trained, "slow doctor.all_reduce rank=1 step=3")
    assert code == 0 and told["ranks"] == 2
    found = of(told, "collectives")
    assert found["level"] == "warning" and "wait 1.0" in found["text"] and found["details"]["rank"] == 1
    assert of(told, "clocks")["level"] == "ok" and abs(of(told, "clocks")["details"]["seconds"]) < 0.5
    assert of(told, "batch")["details"]["world_size"] == 2


@pytest.mark.soak
def test_ranks_that_hang_in_a_collective_are_a_fault_within_the_limit(trained: Run) -> None:
    code, told = processes(trained, "hang doctor.all_reduce rank=1 step=2", "--seconds", "30", "--in-job")
    assert code == 75 and told["seconds"] == 30
    found = of(told, "collectives")
    assert found["fault"] and found["level"] == "problem"
    assert of(told, "start")["level"] == "ok", "what was known before is told as well"
