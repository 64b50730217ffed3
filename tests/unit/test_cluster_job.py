"""What SLURM says of a job, and how many ranks follow from it."""

from __future__ import annotations

import pytest

from mf_scale.cluster.job import counts, marked_comment, parse_facts, slurm_time, this_job
from mf_scale.cluster.layout import cpus_of_a_rank, lay_out, room
from mf_scale.config.schema import Config
from mf_scale.errors import UserError

FACTS = """JobId=8 JobName=my job
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1
   SubmitTime=2026-11-23T09:28:16 EligibleTime=2026-11-23T09:28:16
   Command=/work/launch/multinode.sh
   Comment=mine mf_scale:/runs/a b/code/0123 \n"""
ENVIRONMENT = {
    "SLURM_JOB_ID": "8",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NTASKS": "5",
    "SLURM_JOB_CPUS_PER_NODE": "4(x3)",
    "MF_JOB_FACTS": FACTS,
    "MF_JOB_NODES": "a1\na2\na3",
}


def job(**changes: str | None):
    environment = {**ENVIRONMENT, **changes}
    return this_job({name: value for name, value in environment.items() if value is not None})


def test_a_job_is_read_from_environment_and_scontrol() -> None:
    here = job()
    assert (here.start.job, here.start.restart, here.nodes) == ("8", 2, ("a1", "a2", "a3"))
    assert (here.tasks, here.cpus, here.gpus, here.tasks_asked) == ((2, 2, 1), (4, 4, 4), 0, True)
    assert here.facts["Comment"] == "mine mf_scale:/runs/a b/code/0123"
    assert here.facts["Restarts"] == "2" and here.submitted == slurm_time("2026-11-23T09:28:16") > 0
    assert job(SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="3").start.job == "6_3"
    assert slurm_time("Unknown") == 0
    for without in ({"SLURM_JOB_ID": None}, {"MF_JOB_FACTS": None}):
        with pytest.raises(UserError, match="not started by the script of a SLURM job"):
            job(**without)


def test_counts_by_node_must_fit_the_nodes() -> None:
    assert counts("2(x3),1", 4) == (2, 2, 2, 1)
    with pytest.raises(UserError, match="names 2 nodes, but SLURM counts tasks or CPUs for 3"):
        counts("2(x3)", 2)
    with pytest.raises(UserError, match="cannot be read"):
        counts("two", 1)


def test_the_comment_keeps_what_a_person_wrote() -> None:
    here = job()
    assert marked_comment(here, "mf_scale:", "/runs/a b/code/0123") == ""
    assert marked_comment(here, "mf_scale:", "/other") == "mine mf_scale:/other"
    assert parse_facts("   Comment=(null)\n")["Comment"] == "(null)"


def test_a_rank_uses_one_gpu() -> None:
    gpus = {"SLURM_TASKS_PER_NODE": "2(x3)", "SLURM_GPUS_ON_NODE": "2"}
    assert room(job(**gpus)) == (2, 2, 2)
    with pytest.raises(UserError, match=r"a1 has more tasks than GPUs: 2 tasks, 1 GPUs.*--gpus-per-node=2"):
        room(job(**{**gpus, "SLURM_GPUS_ON_NODE": "1"}))
    with pytest.raises(UserError, match=r"fewer tasks than GPUs: 2 tasks, 4 GPUs.*--ntasks-per-node=4"):
        room(job(**{**gpus, "SLURM_GPUS_ON_NODE": "4"}))
    # Nobody asked for tasks: SLURM's count is that of the CPUs.
    whole = {"SLURM_NTASKS": None, "SLURM_TASKS_PER_NODE": "4(x3)"}
    assert room(job(**whole, SLURM_GPUS_ON_NODE="2")) == (2, 2, 2)
    assert room(job(**whole)) == (1, 1, 1)
    with pytest.raises(UserError, match=r"was given 1 CPUs a node.*--ntasks-per-node=2"):
        room(job(**whole, SLURM_GPUS_ON_NODE="2", SLURM_JOB_CPUS_PER_NODE="1(x3)"))


def test_variables_of_an_outer_job_are_not_its_own() -> None:
    """sbatch from within a job hands them on; scontrol tells what this one asked for."""
    facts = FACTS + "   NumNodes=3 NumCPUs=12 NumTasks=3 CPUs/Task=1\n"
    inner = job(MF_JOB_FACTS=facts, SLURM_NTASKS="5", SLURM_CPUS_PER_TASK="8")
    assert not inner.tasks_asked and inner.cpus_per_task == 0
    own = job(MF_JOB_FACTS=facts, SLURM_NTASKS="3", SLURM_CPUS_PER_TASK="1")
    assert own.tasks_asked and own.cpus_per_task == 1


def test_gpus_over_all_nodes_are_refused_and_cpus_are_shared() -> None:
    with pytest.raises(UserError, match="--gpus-per-node"):
        room(job(SLURM_GPUS="3", SLURM_GPUS_ON_NODE="2"))
    assert room(job(SLURM_GPUS="6", SLURM_GPUS_PER_NODE="2", SLURM_GPUS_ON_NODE="2", SLURM_TASKS_PER_NODE="2(x3)"))
    assert cpus_of_a_rank(job(SLURM_JOB_CPUS_PER_NODE="8,4,8"), 2) == 2
    assert cpus_of_a_rank(job(SLURM_JOB_CPUS_PER_NODE="1(x3)"), 2) == 1
    assert cpus_of_a_rank(job(SLURM_CPUS_PER_TASK="3"), 2) == 3


def config(batch: int, micro: int = 2) -> Config:
    made = Config()
    made.train.global_batch, made.train.micro_batch = batch, micro
    return made


def test_a_first_start_that_cannot_share_the_batch_is_a_mistake() -> None:
    with pytest.raises(UserError, match="global_batch = 8 cannot be shared by 6 ranks"):
        lay_out(config(8), (2, 2, 2), adapt=False)
    fits = lay_out(config(8), (2, 2), adapt=False)
    assert (fits.nodes, fits.ranks, fits.per_node, fits.notes) == (2, 4, 2, ())


@pytest.mark.parametrize(
    ("batch", "places", "nodes", "ranks"),
    [
        (8, (2, 2, 2), 2, 4),
        (8, (2,), 1, 2),
        (6, (4, 4), 2, 6),
        (7, (2, 2), 1, 1),
        (12, (1, 2, 4), 3, 6),
        (5, (8,), 1, 5),
    ],
)
def test_a_start_that_comes_back_takes_the_most_ranks_that_divide(batch, places, nodes, ranks) -> None:
    layout = lay_out(config(batch), places, adapt=True)
    assert (layout.nodes, layout.ranks, layout.per_node) == (nodes, ranks, max(places[:nodes]))
    said = " ".join(layout.notes)
    assert (f"cannot be shared by the {sum(places)} ranks" in said) == (ranks < sum(places))


def test_a_smaller_micro_batch_is_said() -> None:
    """Three ranks of 9 take 3 samples each, which micro-batches of 2 do not divide."""
    layout = lay_out(config(9, micro=2), (3,), adapt=True)
    assert layout.ranks == 3
    assert any("train.micro_batch = 2 does not divide the 3 samples of a rank: 1 are taken" in n for n in layout.notes)
