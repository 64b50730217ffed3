"""Sweeps: which task trains what, arrays that do not fit, and the table; and which stateless jobs come back."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mf_scale.cluster.again import start_again
from mf_scale.cluster.summary import renew_summary
from mf_scale.cluster.sweep import Chosen, Task, choose, listing, this_task
from mf_scale.config.load import load_config
from mf_scale.errors import UserError
from mf_scale.rundir import RunDir
from mf_scale.tracking.launches import append_launch
from mf_scale.tracking.metrics import MetricsLog

BASE = Path(__file__).parents[2] / "configs/base.yaml"


@pytest.fixture
def grid(tmp_path) -> Path:
    (tmp_path / "grid.yaml").write_text("optimizer.lr: [1e-4, 2e-4]\nseed: [0, 1]\n")
    return tmp_path / "grid.yaml"


def chosen(grid: Path, number: int, *, first: int = 0, last: int = 3, count: int = 4, part: bool = False,
           submitted: float = 0, array: str = "7") -> Chosen:  # fmt: skip
    given = [f"run_dir={grid.parent}/a sweep", "data.train=/data"]
    return choose(grid, BASE, given, Task(array, number, first, last, count), submitted=submitted, part=part)


def test_a_task_trains_its_run_in_its_own_directory(grid):
    third = chosen(grid, 2)
    config = load_config(BASE, third.overrides)
    assert (config.optimizer.lr, config.seed) == (2e-4, 0)
    assert config.run_dir == f"{grid.parent}/a sweep/lr-0.0002_seed-0"
    assert third.shell(["c.yaml", "a=b c"]).splitlines()[1].startswith("mf_words=(c.yaml 'a=b c' optimizer.lr=0.0002 ")


def test_what_a_task_was_it_stays(grid):
    """The grid is changed while the array runs: its tasks and their later starts stay, another array's are new."""
    before = chosen(grid, 1)
    grid.write_text("optimizer.lr: [3e-4]\nseed: [5, 6, 7, 8]\n")
    assert chosen(grid, 1) == before
    assert chosen(grid, 1, array="8").run.name == "lr-0.0003_seed-6"
    grid.unlink()
    assert chosen(grid, 3).run.name == "lr-0.0002_seed-1"


def test_a_grid_that_changed_after_the_submission_is_refused(grid):
    assert chosen(grid, 0, submitted=time.time()).run.name == "lr-0.0001_seed-0"
    with pytest.raises(UserError, match="changed after the array was submitted"):
        chosen(grid, 0, array="8", submitted=time.time() - 60)


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ({"last": 1, "count": 2}, r"2 tasks, the grid 4 runs.*--array=0-3.*MF_SWEEP_PART=1"),
        ({"last": 4, "count": 5}, r"a task 4, the grid 4 runs.*--array=0-3"),
        ({"first": 2, "last": 9, "count": 2}, r"a task 9, the grid 4 runs"),
        ({"last": 1, "count": 2, "part": True}, None),
        ({"first": 1, "last": 1, "count": 1}, None),
        ({"first": 0, "last": 2, "count": 2}, None),
    ],
)
def test_the_array_must_fit_the_grid(grid, task, wanted):
    if wanted is None:
        assert chosen(grid, 1, **task).run.name == "lr-0.0001_seed-1"
        return
    with pytest.raises(UserError, match=f"(?s){wanted}"):
        chosen(grid, 1, **task)
    assert not (grid.parent / "a sweep").exists()


def test_outside_of_an_array_and_the_listing(grid):
    with pytest.raises(UserError, match="no task of an array"):
        this_task({"SLURM_JOB_ID": "3"})
    names = {"ARRAY_JOB_ID": 7, "ARRAY_TASK_ID": 2, "ARRAY_TASK_MIN": 0, "ARRAY_TASK_MAX": 3, "ARRAY_TASK_COUNT": 4}
    assert this_task({f"SLURM_{name}": str(value) for name, value in names.items()}) == Task("7", 2, 0, 3, 4)
    text = listing(grid, BASE, ["data.train=/data"], [str(grid), "c.yaml", "tracking.name=a b"])
    assert "3  lr-0.0002_seed-1  0.0002        1" in text
    assert f"sbatch --array=0-3%2 launch/sweep.sh {grid} c.yaml 'tracking.name=a b'" in text
    assert not Path("runs/default/.sweep").exists()


def finished(folder: Path, *, code: int, then: str, why: str, validation: float) -> None:
    run = RunDir(folder)
    append_launch(run, "launch", job="7_0", restart=0, submitted=0, nodes=["n1"], ranks=1, step=0, notes=[])
    log = MetricsLog(run.metrics)
    log.write("start", 0, start=1, steps=4, job="7_0", restart=0)
    for step in (2, 4):
        log.write("step", step, start=1, loss=9.0 / step, images_per_second=12.5, step_time=0.1, updates=step)
        log.write("validation", step, start=1, loss=validation + step)
    log.write("stop", 4, start=1, code=code, reason="done")
    log.write("evaluation", 4, split="train", mIoU=0.9, PQ=0.8)
    log.write("evaluation", 4, split="val", mIoU=0.4321, PQ=None)
    log.write("evaluation", 4, split="train", mIoU=0.9, PQ=0.8)
    log.close()
    append_launch(run, "end", job="7_0", restart=0, code=code, signals=[], step=4, why=why, then=then)


def test_the_table_tells_of_every_run_and_when_all_are_over(grid):
    sweep = grid.parent / "a sweep"
    for number in (0, 1):
        chosen(grid, number)
    text, over = renew_summary(sweep)
    assert not over and text.count("not started") == 4
    for number in range(4):
        folder = Path(chosen(grid, number).overrides[-1].partition("=")[2].strip('"'))
        ended = (0, "done", "done") if number else (3, "final", "a guard of the run")
        finished(folder, code=ended[0], then=ended[1], why=ended[2], validation=number)
        assert renew_summary(sweep)[1] == (number == 3)
    rows = json.loads((sweep / "summary.json").read_text())
    assert [row["state"] for row in rows] == ["guard", "done", "done", "done"]
    assert [row["best_validation"] for row in rows] == [2, 3, 4, 5]
    assert [(row["mIoU"], row["PQ"], row["loss"], row["step"]) for row in rows] == [(0.4321, None, 2.25, 4)] * 4
    table = (sweep / "summary.md").read_text()
    assert table.startswith("# a sweep\n\n| run ") and "| 43.21 | -" in table
    assert len({len(line) for line in table.splitlines()[2:]}) == 1
    left = {file.name for file in sweep.iterdir()}
    assert left == {".sweep", "summary.json", "summary.md", *(row["run"] for row in rows)}


RUNNING = {"JobState": "RUNNING", "Restarts": "0", "Requeue": "1", "PreemptTime": "None", "Reason": "None"}
CANCELLED = {**RUNNING, "JobState": "CANCELLED"}
TIME = {**RUNNING, "JobState": "COMPLETING", "Reason": "TimeLimit"}


@pytest.mark.parametrize(
    ("code", "signals", "facts", "restart", "of_evaluation", "of_pack"),
    [
        (0, [], RUNNING, 0, False, False),
        (0, ["USR1"], RUNNING, 0, False, False),
        (2, [], RUNNING, 0, False, False),
        (3, [], RUNNING, 0, False, False),
        (1, [], RUNNING, 0, False, False),
        (75, [], RUNNING, 9, True, True),
        (75, [], RUNNING, 10, False, False),
        (75, [], {**RUNNING, "Requeue": "0"}, 0, False, False),
        (143, [], {**RUNNING, "PreemptTime": "2026-01-01T00:00:00"}, 50, True, True),
        (143, ["TERM"], CANCELLED, 0, False, False),  # scancel
        (75, ["TERM"], RUNNING, 0, False, True),  # a node that shuts down: the job is not cancelled
        (75, [], CANCELLED, 0, False, False),
        (143, ["USR1"], RUNNING, 0, False, True),
        (143, ["USR1", "TERM"], TIME, 0, False, True),
        (143, ["TERM"], {**RUNNING, "Restarts": "1", "JobState": "COMPLETING"}, 0, False, False),  # SLURM did it
    ],
)
def test_stateless_jobs_come_back_where_that_makes_sense(code, signals, facts, restart, of_evaluation, of_pack):
    told = [start_again(code, signals, facts | {"Restarts": str(max(restart, int(facts["Restarts"])))}, restart,
                        resumes=resumes)[0] for resumes in (False, True)]  # fmt: skip
    assert told == [of_evaluation, of_pack]
