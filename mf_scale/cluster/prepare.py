"""Before the ranks of a start: what can be refused in the first second is, and the job script learns what it must."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mf_scale
from mf_scale.cluster.frozen import CODE, Frozen, freeze, frozen_facts, open_frozen
from mf_scale.cluster.job import Job, marked_comment
from mf_scale.cluster.layout import Layout, cpus_of_a_rank, lay_out, room
from mf_scale.cluster.requeue import fruitless_starts
from mf_scale.config.load import load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import validate
from mf_scale.errors import EXIT_GUARD, GuardError, UserError
from mf_scale.rundir import RunDir, disk_errors
from mf_scale.tracking.launches import FINAL, GIVEN_UP, Launch, append_launch, read_launches
from mf_scale.tracking.progress import Reach, reach_of

SHELL = "# the plan"
"""The line before assignments for a job script, which takes what stands behind it: containers greet on stdout."""
MARK = "mf_scale:"
"""What stands in a job's comment before the folder that its starts are trained from."""


@dataclass(frozen=True)
class Request:
    """What a job script was asked for."""

    config: Path
    overrides: tuple[str, ...]
    """Overrides and options of `mf-scale train`."""
    root: Path
    """The project's folder."""
    live_code: bool = False
    freeze_anew: bool = False
    frozen: Path | None = None
    """The copy that an earlier start, or the submission, left for this one."""


@dataclass(frozen=True)
class Plan:
    """A start that may go on."""

    run: RunDir
    layout: Layout
    arguments: tuple[str, ...]
    """Of `mf-scale train`."""
    code: Path
    """The folder that mf_scale is imported from."""
    comment: str
    """The job's new comment, by which its next start finds the copy; empty where it stays."""
    cpus: int
    """CPUs of a rank."""
    cap: int
    """launch.fruitless_starts."""
    token: Path
    """A file in the run directory that every node must see."""
    notes: tuple[str, ...]

    def shell(self) -> str:
        """Assignments for the job script."""
        words = " ".join(shlex.quote(word) for word in self.arguments)
        values = {
            "mf_run": self.run.path,
            "mf_code": self.code,
            "mf_token": self.token,
            "mf_nodes": self.layout.nodes,
            "mf_ranks": self.layout.ranks,
            "mf_per_node": self.layout.per_node,
            "mf_cpus": self.cpus,
            "mf_comment": self.comment,
            "mf_cap": self.cap,
        }
        lines = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
        return "\n".join([SHELL, *lines, f"mf_arguments=({words})"])


def configuration(request: Request) -> Config:
    """The configuration that is trained, checked by every rule that needs no data; raises UserError."""
    file = request.frozen / "config.yaml" if request.frozen else request.config
    config = load_config(file, [word for word in request.overrides if not word.startswith("-")])
    validate(config)
    return config


def frozen_copy(request: Request, run: RunDir, config: Config, submitted: float) -> Frozen | None:
    """The copy to train from; None with --live-code."""
    if request.live_code:
        return None
    if os.pathsep in str(run.path):
        raise UserError(
            f"the run directory's path holds a {os.pathsep!r}, which Python's path cannot",
            where=str(run.path),
            remedy="Choose another run_dir, or train the present files with --live-code.",
        )
    if request.frozen is not None:
        return open_frozen(request.frozen)
    package = Path(mf_scale.__file__).parent
    return freeze(run, request.config, config, request.root, package, submitted=submitted, anew=request.freeze_anew)


def first_submitted(job: Job, launches: Sequence[Launch]) -> float:
    """Unix seconds at which a person submitted the job; SLURM's own time is that of the last requeue. 0: unknown."""
    return next((launch.submitted for launch in launches if launch.job == job.start.job), job.submitted)


def prepare(request: Request, job: Job) -> Plan:
    """Check and set up a start, and write its line into launches.jsonl; raises UserError, GuardError or FaultError."""
    config = configuration(request)
    run = RunDir(Path(config.run_dir).absolute())
    places = room(job)
    launches = read_launches(run)
    layout = lay_out(config, places, adapt=_comes_back(job, launches, sum(places)))
    reached, submitted = reach_of(run), first_submitted(job, launches)
    _refuse_ended(job, launches, submitted, reached, config.launch.fruitless_starts)
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    frozen = frozen_copy(request, run, config, submitted)
    notes = [*(frozen.notes if frozen else ()), *layout.notes]
    token = _token(run, job)
    append_launch(
        run,
        "launch",
        job=job.start.job,
        restart=job.start.restart,
        submitted=submitted,
        nodes=list(job.nodes[: layout.nodes]),
        ranks=layout.ranks,
        step=reached.step,
        committed=reached.committed,
        notes=notes,
    )
    return Plan(
        run=run,
        layout=layout,
        arguments=(str(frozen.config if frozen else request.config), *request.overrides),
        code=frozen.folder if frozen else Path(mf_scale.__file__).parents[1],
        comment=marked_comment(job, MARK, str(frozen.folder)) if frozen else "",
        cpus=cpus_of_a_rank(job, layout.per_node),
        cap=config.launch.fruitless_starts,
        token=token,
        notes=(*notes, _about(frozen)),
    )


def _comes_back(job: Job, launches: Sequence[Launch], places: int) -> bool:
    """Whether the number of ranks may adapt: nobody stands by to mend a job that SLURM brings back, and a run that
    goes on with less than it had takes what there is. A first start that cannot share the batch is a mistake."""
    mine = any(launch.job == job.start.job for launch in launches)
    return mine or job.start.restart > 0 or bool(launches and places < launches[-1].ranks)


def _refuse_ended(job: Job, launches: Sequence[Launch], submitted: float, reached: Reach, cap: int) -> None:
    """A later job of a chain must not bring back a run that was ended; whoever submits anew, after it, may."""
    last = launches[-1] if launches else None
    if last is not None and submitted and (last.ended or 0) > submitted:
        if last.then == FINAL and last.code == EXIT_GUARD:
            raise GuardError(
                f"a guard ended this run in job {last.job}, after this job was submitted",
                where=f"job {job.start.job}",
                remedy="See its log; submit again once you have seen to it.",
            )
        if last.then == GIVEN_UP and last.job != job.start.job:
            raise GuardError(
                f"job {last.job} was given up: {cap} starts brought the run no further than step {reached.step:,}",
                where=f"job {job.start.job}",
                remedy="See its log; submit again once you have seen to it.",
            )
    if fruitless_starts(launches, since=submitted, now=reached) >= cap:
        raise GuardError(
            f"{cap} starts in a row brought the run no further than step {reached.step:,}; the last one: "
            f"{(last.why if last else '') or 'cut off without a word'}",
            where=f"job {job.start.job}, launch.fruitless_starts = {cap}",
            remedy="See the log, then submit again.",
        )


def _token(run: RunDir, job: Job) -> Path:
    """A fresh file that the other nodes look for; those of earlier starts go."""
    for old in run.path.glob(f".seen-{job.start.job}-*"):
        old.unlink(missing_ok=True)
    token = run.path / f".seen-{job.start.job}-{job.start.restart}-{secrets.token_hex(4)}"
    with disk_errors(token):
        token.touch()
    return token


def _about(frozen: Frozen | None) -> str:
    if frozen is None:
        return f"training from the present files in {Path(mf_scale.__file__).parents[1]} (--live-code)"
    facts = frozen_facts(frozen.folder)
    commit = f", commit {facts['commit']}" if facts.get("commit") else ""
    return f"code and configuration as of {facts.get('frozen')}{commit}: {CODE}/{frozen.folder.name}"
