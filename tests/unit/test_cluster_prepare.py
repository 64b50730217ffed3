"""Before the ranks of a start: what goes on, what is refused, and what the job script is told."""

from __future__ import annotations

import errno
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mf_scale.cluster.__main__ import main
from mf_scale.cluster.job import this_job
from mf_scale.cluster.prepare import SHELL, Plan, Request, prepare
from mf_scale.errors import GuardError, UserError
from mf_scale.rundir import RunDir
from mf_scale.tracking.launches import append_launch, read_launches

ROOT = Path(__file__).parents[2]
SUBMITTED = time.time() - 1000


@dataclass
class Start:
    """A start of job 7 (or another one) with room for ranks on some nodes."""

    folder: Path

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "run")

    def prepare(
        self,
        tasks: str = "2(x2)",
        *words: str,
        job: str = "7",
        restart: int = 0,
        comment: str = "",
        submitted: float = SUBMITTED,
        frozen: Path | None = None,
    ) -> Plan:
        nodes = [f"a{number}" for number in range(1, 2 + (int(tasks[3]) - 1 if "x" in tasks else 0))]
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(submitted))
        note = f"\n   Comment={comment}" if comment else ""
        environment = {
            "SLURM_JOB_ID": job,
            "SLURM_RESTART_COUNT": str(restart),
            "SLURM_TASKS_PER_NODE": tasks,
            "SLURM_NTASKS": "4",
            "SLURM_JOB_CPUS_PER_NODE": tasks,
            "MF_JOB_NODES": " ".join(nodes),
            "MF_JOB_FACTS": f"JobId={job} JobName=x\n   SubmitTime={when}{note}",
        }
        given = [word for word in words if word not in ("--live-code", "--freeze-anew")]
        overrides = ("data.train=somewhere", f"run_dir={self.folder}/run", "train.global_batch=8", *given)
        request = Request(
            ROOT / "configs/base.yaml",
            overrides,
            ROOT,
            live_code="--live-code" in words,
            freeze_anew="--freeze-anew" in words,
            frozen=frozen,
        )
        return prepare(request, this_job(environment))

    def ends(self, code: int, then: str, *, job: str = "7", restart: int = 0, step: int = 0) -> None:
        append_launch(
            self.run, "end", job=job, restart=restart, code=code, signals=[], step=step, why="because", then=then
        )


def shell(plan: Plan) -> dict[str, str]:
    """The assignments behind the line that the job script looks for."""
    return dict(line.split("=", 1) for line in plan.shell().partition(f"{SHELL}\n")[2].splitlines())


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path)


def test_the_job_script_is_told_what_to_start(start: Start) -> None:
    plan = start.prepare("2(x2)", "--live-code")
    lines = shell(plan)
    assert (lines["mf_nodes"], lines["mf_ranks"], lines["mf_per_node"], lines["mf_cap"]) == ("2", "4", "2", "5")
    assert shlex.split(lines["mf_run"]) == [str(start.run.path)]
    assert plan.token.is_file() and lines["mf_comment"] == "''"
    assert shlex.split(lines["mf_arguments"].strip("()"))[1] == "data.train=somewhere"
    assert any("--live-code" in note for note in plan.notes)
    launched = read_launches(start.run)
    assert [(one.job, one.restart, one.nodes, one.ranks) for one in launched] == [("7", 0, ("a1", "a2"), 4)]


def test_words_with_blanks_and_quotes_survive_the_shell(tmp_path: Path) -> None:
    odd = Start(tmp_path / "it's a $(folder)")
    plan = odd.prepare("1", "--live-code", "data.val=a b")
    lines = shell(plan)
    assert shlex.split(lines["mf_run"]) == [str(odd.run.path)]
    assert "data.val=a b" in shlex.split(lines["mf_arguments"].strip("()"))


def test_a_copy_is_named_in_the_comment_and_found_there(start: Start) -> None:
    plan = start.prepare("1", "--freeze-anew", comment="mine")
    folder = Path(plan.arguments[0]).parent
    assert plan.comment == f"mine mf_scale:{folder}" and plan.code == folder
    assert folder.parent == start.run.path / "code" and (folder / "mf_scale/cli.py").is_file()
    again = start.prepare("1", restart=1, comment=plan.comment, frozen=folder)
    assert again.code == folder and again.comment == ""


def test_only_a_start_that_comes_back_takes_fewer_ranks(start: Start) -> None:
    with pytest.raises(UserError, match="cannot be shared by 6 ranks"):
        start.prepare("2(x3)", "--live-code")
    assert not start.run.path.exists()
    assert start.prepare("2(x2)", "--live-code").layout.ranks == 4
    assert start.prepare("2(x3)", "--live-code", restart=1).layout.ranks == 4  # nobody stands by to mend it
    assert start.prepare("3", "--live-code", job="8").layout.ranks == 2  # another job, with less than before
    with pytest.raises(UserError, match="cannot be shared by 6 ranks"):
        start.prepare("2(x3)", "--live-code", job="9")  # another one, with more


def test_a_guard_ends_a_chain_and_whoever_submits_afterwards_goes_on(start: Start) -> None:
    start.prepare("1", "--live-code")
    start.ends(3, "final")
    with pytest.raises(GuardError, match="a guard ended this run in job 7, after this job was submitted"):
        start.prepare("1", "--live-code", job="8")
    assert start.prepare("1", "--live-code", job="9", submitted=time.time() + 2)


def test_a_job_given_up_ends_a_chain(start: Start) -> None:
    start.prepare("1", "--live-code")
    start.ends(1, "given up")
    with pytest.raises(GuardError, match="job 7 was given up"):
        start.prepare("1", "--live-code", job="8")


def test_starts_that_are_cut_off_before_they_bring_anything_are_counted(start: Start) -> None:
    """SLURM brings back by itself what a lost node cut off, so the job script never sees their ends."""
    for restart in range(3):
        start.prepare("1", "--live-code", "launch.fruitless_starts=3", restart=restart)
    with pytest.raises(
        GuardError, match=r"3 starts in a row brought the run no further than step 0; .* without a word"
    ):
        start.prepare("1", "--live-code", "launch.fruitless_starts=3", restart=3)
    anew = start.prepare("1", "--live-code", "launch.fruitless_starts=3", job="8", submitted=time.time() + 2)
    assert anew.layout.ranks == 1


def test_the_first_submission_counts_and_not_slurms_last_requeue(start: Start) -> None:
    start.prepare("1", "--live-code", "launch.fruitless_starts=2")
    start.prepare("1", "--live-code", "launch.fruitless_starts=2", restart=1, submitted=time.time() + 50)
    with pytest.raises(GuardError, match="2 starts in a row"):
        start.prepare("1", "--live-code", "launch.fruitless_starts=2", restart=2, submitted=time.time() + 100)
    assert {one.submitted for one in read_launches(start.run)} == {float(int(SUBMITTED))}


def test_a_mistake_changes_nothing(start: Start) -> None:
    with pytest.raises(UserError, match="is not a key"):
        start.prepare("1", "train.stps=3")
    assert not start.run.path.exists()


def test_launches_outlive_a_torn_line(start: Start) -> None:
    start.prepare("1", "--live-code")
    with (start.run.path / "launches.jsonl").open("a") as file:
        file.write('{"event": "end", "job": "7", "rest')
    start.prepare("1", "--live-code", restart=1)
    start.ends(0, "done", restart=1)
    assert [(one.restart, one.then) for one in read_launches(start.run)] == [(0, ""), (1, "done")]


def test_a_path_that_pythons_path_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a ':'"):
        Start(tmp_path / "10:30").prepare("1")
    assert Start(tmp_path / "10:30").prepare("1", "--live-code").layout.ranks == 1


def test_two_jobs_on_one_run_leave_each_others_file_alone(start: Start) -> None:
    mine = start.prepare("1", "--live-code").token
    start.prepare("1", "--live-code", job="8")
    assert mine.is_file()
    assert start.prepare("1", "--live-code", restart=1).token != mine and not mine.exists()


def test_what_fails_at_the_end_of_a_start_does_not_keep_the_job_away(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start.prepare("1", "--live-code")
    facts = {"MF_JOB_FACTS": "JobId=7\n JobState=RUNNING Requeue=1 Restarts=0 NumTasks=1", "MF_JOB_NODES": "a1"}
    for name, value in {"SLURM_JOB_ID": "7", **facts}.items():
        monkeypatch.setenv(name, value)
    words = ["decide", "--run", str(start.run.path), "--code", "137", "--cap", "5"]
    full = full_disk()
    assert main(words) == 0
    told = capsys.readouterr()
    assert told.out == "requeue\n" and "not on record: cannot write: No space left" in told.err
    full.undo()
    monkeypatch.setattr("mf_scale.cluster.__main__.read_launches", broken)
    assert main(words) == 75
    assert "the storage fails" in capsys.readouterr().err


def broken(run: RunDir) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def full_disk() -> pytest.MonkeyPatch:
    """A disk that takes nothing more of launches.jsonl."""
    patch = pytest.MonkeyPatch()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr("mf_scale.tracking.launches.os.write", full)
    return patch
