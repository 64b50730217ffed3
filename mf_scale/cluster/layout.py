"""How many ranks a job starts, and on how many of its nodes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mf_scale.cluster.job import Job
from mf_scale.config.schema import Config
from mf_scale.config.validate import plan_batch, plan_note
from mf_scale.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The step that trains."""

    nodes: int
    ranks: int
    per_node: int
    """Ranks of a node at most."""
    notes: tuple[str, ...] = ()
    """What a person should know about it."""


def room(job: Job) -> tuple[int, ...]:
    """Ranks that each node of the job has room for; raises UserError where tasks and GPUs contradict each other."""
    if job.gpus_unevenly and len(job.nodes) > 1:
        raise UserError(
            "the job asked for a number of GPUs over all of its nodes, so that nodes may have different numbers",
            where=f"job {job.start.job}",
            remedy="Ask for --gpus-per-node.",
        )
    if job.gpus == 0:
        return job.tasks if job.tasks_asked else (1,) * len(job.nodes)
    if job.tasks_asked:
        for node, tasks in zip(job.nodes, job.tasks, strict=True):
            if tasks != job.gpus:
                few = "more tasks than" if tasks > job.gpus else "fewer tasks than"
                raise UserError(
                    f"{node} has {few} GPUs: {tasks} tasks, {job.gpus} GPUs; a rank uses one GPU",
                    where=f"job {job.start.job}",
                    remedy=f"Ask for --gpus-per-node={tasks} or --ntasks-per-node={job.gpus}.",
                )
        return job.tasks
    if min(job.cpus) < job.gpus:
        raise UserError(
            f"the job has {job.gpus} GPUs a node, but asked for no tasks and was given {min(job.cpus)} CPUs a node, "
            "less than one a rank",
            where=f"job {job.start.job}",
            remedy=f"Add --ntasks-per-node={job.gpus} and, for the loader processes, --cpus-per-task.",
        )
    return (job.gpus,) * len(job.nodes)


def cpus_of_a_rank(job: Job, per_node: int) -> int:
    """CPUs of each rank: as many as asked for, else its share of the node that has fewest."""
    return job.cpus_per_task or max(1, min(job.cpus) // per_node)


def lay_out(config: Config, places: tuple[int, ...], *, adapt: bool) -> Layout:
    """The ranks of a start that has `places` for ranks on its nodes.

    As many as there are places. Where the global batch cannot be shared by so many, the largest number that divides it
    if `adapt` (a start that comes back to what the cluster has left), else the UserError of `plan_batch`.
    """
    most = sum(places)
    ranks, notes = most, []
    if adapt:
        ranks = next(number for number in range(most, 0, -1) if _fits(config, number))
    plan = plan_batch(config, ranks)
    nodes = next(count for count in range(1, len(places) + 1) if sum(places[:count]) >= ranks)
    if ranks < most:
        nodes_of = f" on {nodes} of {len(places)} nodes" if nodes < len(places) else ""
        notes.append(
            f"train.global_batch = {config.train.global_batch} cannot be shared by the {most} ranks that this "
            f"allocation has room for: {ranks} are started{nodes_of}"
        )
    note = plan_note(config, plan)
    return Layout(nodes, ranks, max(places[:nodes]), (*notes, *([note] if note else [])))


def _fits(config: Config, ranks: int) -> bool:
    try:
        plan_batch(config, ranks)
    except UserError:
        return False
    return True
