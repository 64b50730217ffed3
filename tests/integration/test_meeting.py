"""Ranks of a SLURM step meet at a port that nobody guessed, and only as the same program."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest

import mf_scale
from mf_scale.distributed.invitation import Invitation, publish
from tests.integration.program import Run
from tests.integration.slurm_step import Step

pytestmark = pytest.mark.integration
RANK = str(Path(__file__).with_name("meeting_rank.py"))
NAME = ".meeting-41-0-0"


def rank(folder: Path, *, timeout: float = 60, name: str = "a") -> list[str]:
    return [RANK, str(folder), str(timeout), name]


def test_three_ranks_meet_and_leave_no_file(tmp_path):
    step = Step(3)
    for number in range(3):
        step.start(number, rank(tmp_path / "run"))
    for code, out, err in step.end().values():
        assert code == 0, err
        assert out.startswith("sum 3 ")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_late_rank_is_waited_for_and_what_earlier_starts_left_is_no_obstacle(tmp_path):
    """A file of this very name with a dead port, one with a port that a silent stranger answers, one of a start before
    and one of another job that is gathering just now."""
    with socket.create_server(("127.0.0.1", 0)) as dead:
        port = dead.getsockname()[1]
    before, other = tmp_path / ".meeting-41-1-0", tmp_path / ".meeting-42-0-0"
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        for file, number in ((tmp_path / ".meeting-41-2-0", stranger.getsockname()[1]), (before, port), (other, port)):
            publish(file, Invitation(("127.0.0.1",), number, "nonce"))
        step = Step(3, restart=2)
        step.start(1, rank(tmp_path))
        time.sleep(4)
        step.start(0, rank(tmp_path))
        time.sleep(2)
        step.start(2, rank(tmp_path))
        ended = step.end()
    for code, out, err in ended.values():
        assert code == 0, err
        assert out.startswith("sum 3 ")
    assert list(tmp_path.iterdir()) == [other]


def test_a_rank_that_does_not_come_is_named(tmp_path):
    step = Step(4)
    for number in (0, 1):
        step.start(number, rank(tmp_path, timeout=16))
    ended = step.end()
    assert {code for code, _, _ in ended.values()} == {75}
    said, silent = ended[0][2], ended[1][2]
    assert "2 ranks (2, 3) did not come within 8 s" in said
    assert f"2 ranks (0, 1) on {socket.gethostname()}" in said
    assert "node[1-2]" in said
    assert "mf-scale: " not in silent
    assert list(tmp_path.iterdir()) == []


def test_without_rank_0_the_others_end_and_say_what_they_waited_for(tmp_path):
    step = Step(2)
    step.start(1, rank(tmp_path, timeout=24))
    publish(tmp_path / NAME, Invitation(("127.0.0.1",), 1, "nonce"))  # of one that died
    code, _, err = step.end()[1]
    assert code == 75
    assert "rank 1 on " in err
    assert "did not find rank 0 within 12 s: port 1 of 127.0.0.1 (Connection refused)" in err
    assert NAME in err


def test_a_folder_that_cannot_be_written_is_a_mistake_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("")
    step = Step(2)
    for number in range(2):
        step.start(number, rank(tmp_path / "file/run"))
    ended = step.end()
    assert {code for code, _, _ in ended.values()} == {2}
    assert "the ranks cannot meet in this folder" in ended[0][2]
    assert str(tmp_path / "file/run") in ended[0][2]


@pytest.mark.parametrize("change", ["code", "settings"])
def test_a_mixture_of_programs_is_refused_and_told(tmp_path, change):
    (tmp_path / "other").mkdir()
    copy = shutil.copytree(Path(mf_scale.__file__).parent, tmp_path / "other/mf_scale")
    step = Step(3)
    for number in range(3):
        odd = number == 1
        environment = {"PYTHONPATH": str(tmp_path / "other")} if odd and change == "code" else {}
        step.start(number, rank(tmp_path, name="b" if odd and change == "settings" else "a"), **environment)
        if number == 0:
            with (copy / "training/schedule.py").open("a") as file:
                file.write("# changed\n")
    ended = step.end()
    assert {code for code, _, _ in ended.values()} == {2}
    said = ended[0][2]
    here = socket.gethostname()
    if change == "code":
        assert "they differ in code of mf_scale/training/schedule.py (" in said
        assert f"on ranks 0, 2 ({here}); " in said
        assert f"on rank 1 ({here}))" in said
    else:
        assert f'they differ in train.name ("a" on ranks 0, 2 ({here}); "b" on rank 1 ({here}))' in said
    assert "Start all ranks from one folder" in said
    assert "mf-scale: " not in ended[1][2] + ended[2][2]


def test_train_and_evaluate_meet_in_the_run_directory(tmp_path, packed):
    run = Run(tmp_path / "run", packed)
    train = run.command("train.steps=2", "checkpoint.every_steps=0")[1:-2]
    evaluate = ["-m", "mf_scale.cli", "evaluate", str(run.folder)]
    for command in (train, evaluate):
        step = Step(2)
        for number in range(2):
            step.start(number, command)
        for code, _, err in step.end(timeout=150).values():
            assert code == 0, err
    assert list(run.series("step", "loss")) == [1, 2]
    found = json.loads((run.folder / "report/evaluation-val.json").read_text())
    assert found["samples"] == 13
    assert not list(run.folder.glob(".meeting-*"))
    for same, odd, told in ((train, "train.log_every=7", "train.log_every"), (evaluate, "seed=7", "overrides")):
        step = Step(2)
        step.start(0, same)
        step.start(1, [*same, odd])
        ended = step.end(timeout=150)
        assert [ended[rank][0] for rank in (0, 1)] == [2, 2]
        assert f"they differ in {told} (" in ended[0][2]


def test_an_evaluation_of_nothing_is_refused_before_the_ranks_meet(tmp_path):
    step = Step(2)
    step.start(0, ["-m", "mf_scale.cli", "evaluate", str(tmp_path / "nothing")])
    code, _, err = step.end()[0]
    assert code == 2
    assert "neither a run directory nor a checkpoint" in err
    assert list(tmp_path.iterdir()) == []
