"""What SLURM says of the job that a job script runs in: its environment and `scontrol show job`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from mf_scale.distributed.env import JobStart, job_start
from mf_scale.errors import UserError

FACTS, NODES = "MF_JOB_FACTS", "MF_JOB_NODES"
"""Variables in which the job script hands over what scontrol prints (`show job`, `show hostnames`): inside a
container there is no scontrol."""


@dataclass(frozen=True)
class Job:
    """One start of a job: its place in the cluster and what it was given."""

    start: JobStart
    number: str
    """The plain job id, also for a task of an array."""
    nodes: tuple[str, ...]
    tasks: tuple[int, ...]
    """Tasks that SLURM counts on each node."""
    tasks_asked: bool
    """Whether the job asked for tasks; else SLURM's count means nothing (it may be the number of CPUs)."""
    cpus: tuple[int, ...]
    """CPUs of the job on each node."""
    gpus: int
    """GPUs of the job on a node; 0: none."""
    gpus_unevenly: bool
    """GPUs were asked for over all nodes together."""
    cpus_per_task: int
    """As asked for; 0: not."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Fields of `scontrol show job`."""

    @property
    def submitted(self) -> float:
        """Unix seconds at which the job was submitted; 0 where SLURM does not tell."""
        return slurm_time(self.facts.get("SubmitTime", ""))


def this_job(environment: Mapping[str, str] = os.environ) -> Job:
    """The job whose script started this process; raises UserError outside of one."""
    start = job_start(environment)
    if start is None or FACTS not in environment:
        raise UserError(
            "this was not started by the script of a SLURM job",
            remedy="Submit it: sbatch launch/multinode.sh CONFIG; without SLURM take launch/local.sh.",
        )
    number = environment["SLURM_JOB_ID"]
    nodes = tuple(environment.get(NODES, "").split())
    facts = parse_facts(environment[FACTS])
    return Job(
        start=start,
        number=number,
        nodes=nodes,
        tasks=counts(environment.get("SLURM_TASKS_PER_NODE", "1"), len(nodes)),
        tasks_asked=_own(environment, "SLURM_NTASKS", facts.get("NumTasks")),
        cpus=counts(environment.get("SLURM_JOB_CPUS_PER_NODE", "1"), len(nodes)),
        gpus=_whole(environment.get("SLURM_GPUS_ON_NODE", "0")),
        gpus_unevenly="SLURM_GPUS" in environment and "SLURM_GPUS_PER_NODE" not in environment,
        cpus_per_task=_whole(environment["SLURM_CPUS_PER_TASK"])
        if _own(environment, "SLURM_CPUS_PER_TASK", facts.get("CPUs/Task"))
        else 0,
        facts=facts,
    )


def parse_facts(text: str) -> dict[str, str]:
    """`Name=value` fields of what scontrol prints. The comment is the rest of its line, since it may hold blanks."""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, rest = line.strip().partition("=")
        if equals and name in ("Comment", "Command", "WorkDir", "StdOut", "StdErr", "JobName"):
            facts[name] = rest.rstrip()
            continue
        for word in line.split():
            name, equals, value = word.partition("=")
            if equals:
                facts.setdefault(name, value)
    return facts


def marked_comment(job: Job, mark: str, text: str) -> str:
    """The job's comment with `mark + text` behind it, where the next start finds it; empty where it stands already."""
    before = job.facts.get("Comment", "").partition(mark)[0].strip()
    comment = f"{before} {mark}{text}".strip()
    return "" if comment == job.facts.get("Comment", "").strip() else comment


def slurm_time(text: str) -> float:
    """Unix seconds of SLURM's local time; 0 for `Unknown`, `None` and the like."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0


def counts(text: str, nodes: int) -> tuple[int, ...]:
    """`2(x3),1` as (2, 2, 2, 1); raises UserError where it does not fit the number of nodes."""
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"SLURM's counts by node cannot be read: {text!r}", where="environment")
        values += [int(match[1])] * int(match[2] or 1)
    if len(values) != nodes:
        raise UserError(
            f"the allocation names {nodes} nodes, but SLURM counts tasks or CPUs for {len(values)} ({text})",
            where="SLURM_JOB_NODELIST",
            remedy="A node left the allocation (--no-kill): submit again without it.",
        )
    return tuple(values)


def _own(environment: Mapping[str, str], name: str, told: str | None) -> bool:
    """Whether a variable is this job's: one submitted from within another job inherits that one's."""
    return name in environment and told in (None, "N/A", environment[name])


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0
