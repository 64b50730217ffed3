"""The testbed tells the truth: a real SLURM, faults that are faults, and nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import processes
from tests.slurm.boxes import BoxError
from tests.slurm.client import ClusterError
from tests.slurm.settings import Settings
from tests.slurm.testbed import Cluster

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2")

SHOW = """#!/bin/bash
#SBATCH --output=job.log
env > batch.env
srun python3 -c 'import os, time
print(*[os.environ.get(n, "-") for n in ("SLURM_PROCID", "CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME")], flush=True)'
"""

STAY = """#!/bin/bash
#SBATCH --output=job.log --open-mode=append --requeue
echo "batch start ${SLURM_RESTART_COUNT:-0}"
trap 'echo "batch TERM"' TERM
srun bash -c 'trap "echo rank \\$SLURM_PROCID TERM" TERM; echo rank $SLURM_PROCID up; while :; do sleep 0.2; done' &
while :; do sleep 0.2; done
"""


def script(folder: Path, text: str) -> str:
    path = folder / "job.sh"
    path.write_text(text)
    return str(path)


def stay(cluster: Cluster, folder: Path) -> int:
    """Submit a job of two nodes and four ranks that ends only when it is made to; wait until all ranks are up."""
    job = cluster.sbatch(*TWO_BY_TWO, script(folder, STAY), cwd=folder)
    ranks_up(cluster, job, 0)
    return job


def ranks_up(cluster: Cluster, job: int, restarts: int, timeout: float = 60) -> None:
    cluster.wait_start(job, restarts, timeout)
    cluster.wait_until("four ranks up", lambda: cluster.output(job).count("up\n") >= 4 * (restarts + 1), 20, job)


def test_a_step_of_four_ranks_sees_its_gpus_and_nothing_of_the_tests(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(cluster.node_states().values()) == {"idle"} and len(cluster.node_states()) == 3
    monkeypatch.setenv("OF_THE_TESTS", "1")
    job = cluster.sbatch(*TWO_BY_TWO, script(tmp_path, SHOW), cwd=tmp_path, env={"GIVEN": "a b"})
    cluster.wait_for(job, "COMPLETED", 30)
    said = sorted(line.split() for line in cluster.output(job).splitlines())
    head, second = cluster.nodes[:2]
    assert said == [[str(rank), "0,1", head if rank < 2 else second] for rank in range(4)]
    batch = dict(line.split("=", 1) for line in (tmp_path / "batch.env").read_text().splitlines())
    assert batch["GIVEN"] == "a b" and batch["SLURM_SUBMIT_DIR"] == str(tmp_path)
    assert not [name for name in batch if name.startswith(("PYTEST", "OF_THE_TESTS", "VIRTUAL_ENV"))]
    assert cluster.exit_code(job) == 0 and cluster.nodes_of(job) == [head, second]


def test_waits_are_bounded_and_say_what_is_the_matter(cluster: Cluster, tmp_path: Path) -> None:
    ends = script(tmp_path, "#!/bin/bash\necho broken pipe dream\nexit 7\n")
    job = cluster.sbatch("--output=job.log", ends, cwd=tmp_path)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"ended FAILED(?s:.*)broken pipe dream"):
        cluster.wait_for(job, "COMPLETED", 60)
    assert cluster.exit_code(job) == 7
    with pytest.raises(ClusterError, match=r"not within 0.2 s: pigs fly(?s:.*)NODELIST"):
        cluster.wait_until("pigs fly", lambda: False, 0.2)
    with pytest.raises(BoxError, match="--nodes"):
        cluster.sbatch("--nodes=nonsense", script(tmp_path, SHOW), cwd=tmp_path)
    with pytest.raises(BoxError, match=r"did not end in 0\.5 s"):
        cluster.run(cluster.nodes[0], "sleep", "77", timeout=0.5)
    assert time.monotonic() - began < 20
    assert not [p for p in cluster.processes(cluster.nodes[0]) if p.command == "sleep 77"]


@pytest.mark.soak
def test_a_higher_partition_takes_the_nodes_and_gives_them_back(cluster: Cluster, tmp_path: Path) -> None:
    low = stay(cluster, tmp_path)
    wanted = ("--partition=high", "--nodes=3", "--gres=gpu:2", "--output=high.log", "--wrap", "sleep 1")
    began = time.monotonic()
    high = cluster.sbatch(*wanted, cwd=tmp_path)
    cluster.wait_output(low, "rank 3 TERM", 10)
    assert "batch TERM" not in cluster.output(low)  # the steps alone are told at first
    cluster.wait_for(high, "COMPLETED", cluster.settings.grace + cluster.settings.kill_wait + 20)
    assert "batch TERM" in cluster.output(low) and time.monotonic() - began > cluster.settings.grace - 1
    ranks_up(cluster, low, 1)
    assert cluster.restarts(low) == 1


def test_one_node_may_see_other_files_and_another_time(cluster: Cluster, tmp_path: Path) -> None:
    first, second = cluster.nodes[:2]
    here, other = tmp_path / "here", tmp_path / "other"
    for folder, text in ((here, "shared"), (other, "changed")):
        folder.mkdir()
        (folder / "file").write_text(text)
    cluster.hide(first, here)
    cluster.overlay(second, here / "file", other / "file")
    assert cluster.run(first, "ls", str(here)).stdout == ""
    assert cluster.run(second, "cat", str(here / "file")).stdout == "changed"
    assert cluster.run(cluster.nodes[2], "cat", str(here / "file")).stdout == "shared" == (here / "file").read_text()
    cluster.skew_clock(second, 3600)
    clock = "srun python3 -c 'import os, time; print(os.environ[\"SLURM_PROCID\"], time.time())'"
    job = cluster.sbatch(*TWO_BY_TWO, "--output=clock.log", "--wrap", clock, cwd=other)
    cluster.wait_for(job, "COMPLETED", 30)
    ahead = {int(rank): float(seen) - time.time() for rank, seen in map(str.split, cluster.output(job).splitlines())}
    assert [round(ahead[rank] / 3600) for rank in range(4)] == [0, 0, 1, 1]
    cluster.heal()
    assert cluster.run(first, "cat", str(here / "file")).stdout == "shared"
    assert cluster.run(second, "cat", str(here / "file")).stdout == "shared"


def test_a_rank_can_be_killed(cluster: Cluster, tmp_path: Path) -> None:
    job = stay(cluster, tmp_path)
    ranks = cluster.ranks(job)
    assert sorted(ranks) == [0, 1, 2, 3] and sorted(cluster.ranks(job, cluster.nodes_of(job)[1])) == [2, 3]
    ranks[3].kill(signal.SIGKILL)
    cluster.wait_until("rank 3 gone", lambda: 3 not in cluster.ranks(job), 10, job)
    assert sorted(cluster.ranks(job)) == [0, 1, 2]


@pytest.mark.soak
def test_a_node_without_power_loses_its_job_to_the_others(cluster: Cluster, tmp_path: Path) -> None:
    job = stay(cluster, tmp_path)
    head = cluster.nodes_of(job)[0]
    cluster.kill_node(head)
    assert not cluster.powered(head) and cluster.processes(head) == []
    cluster.wait_node(head, "down", 60)
    ranks_up(cluster, job, 1, 120)
    assert head not in cluster.nodes_of(job)
    cluster.start_node(head)
    cluster.wait_node(head, "idle", 30)


@pytest.mark.soak
def test_a_cut_node_is_down_while_its_ranks_go_on_until_it_is_back(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.network:
        pytest.skip("the nodes have no networks of their own here")
    job = stay(cluster, tmp_path)
    lost = cluster.nodes_of(job)[1]
    cluster.cut_node(lost)
    survivors = cluster.ranks(job, lost)
    cluster.wait_node(lost, "down", 60)
    ranks_up(cluster, job, 1, 120)
    assert all(rank.alive() for rank in survivors.values()) and sorted(survivors) == [2, 3]
    assert lost not in cluster.nodes_of(job)
    cluster.join_node(lost)
    cluster.wait_node(lost, "idle", 60)
    cluster.wait_until("survivors gone", lambda: not any(rank.alive() for rank in survivors.values()), 60, job)


@pytest.mark.soak
def test_a_dead_slurmd_with_its_tasks(cluster: Cluster, tmp_path: Path) -> None:
    job = stay(cluster, tmp_path)
    lost = cluster.nodes_of(job)[1]
    cluster.kill_daemon(lost, with_jobs=True)
    cluster.wait_until("an empty node that has power", lambda: not cluster.processes(lost), 5, job)
    assert cluster.powered(lost)
    cluster.wait_node(lost, "down", 60)
    ranks_up(cluster, job, 1, 120)
    assert lost not in cluster.nodes_of(job)


def test_a_cluster_ends_with_nothing_left(cluster_folder: Path, tmp_path: Path) -> None:
    before = traces()
    second = Cluster(cluster_folder / "second", Settings(nodes=2, gpus=1))
    with second:
        job = second.sbatch("--nodes=2", "--output=job.log", script(tmp_path, STAY), cwd=tmp_path)
        second.wait_output(job, "rank 1 up", 30)
        second.hide(second.nodes[0], tmp_path)
        second.kill_node(second.nodes[1])
        assert traces() != before
    assert traces() == before and not second.places.folder.exists()
    second.down()  # and again


def test_a_cluster_ends_with_its_killed_owner(cluster_folder: Path) -> None:
    before = traces()
    folder = cluster_folder / "third"
    code = (
        "import sys, time; from pathlib import Path; from tests.slurm.testbed import Cluster, Settings\n"
        "Cluster(Path(sys.argv[1]), Settings(nodes=1)).up(); print('up', flush=True); time.sleep(300)"
    )
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout and owner.stdout.readline() == "up\n"
        finally:
            owner.kill()
    deadline = time.monotonic() + 10
    while traces()["processes"] != before["processes"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert traces()["processes"] == before["processes"]
    assert folder.exists()
    Cluster(cluster_folder / "fourth", Settings(nodes=1)).__enter__().down()  # the next one tidies up
    assert traces() == before and not folder.exists()


def test_nodes_of_one_host_where_there_are_no_networks(cluster_folder: Path, tmp_path: Path) -> None:
    with Cluster(cluster_folder / "loop", Settings(nodes=2, network=False)) as loop:
        job = loop.sbatch(*TWO_BY_TWO, script(tmp_path, SHOW), cwd=tmp_path)
        loop.wait_for(job, "COMPLETED", 30)
        nodes = sorted(line.split()[2] for line in loop.output(job).splitlines())
        assert nodes == [node for node in loop.nodes for _ in range(2)]
        with pytest.raises(BoxError, match="no network can be cut"):
            loop.cut_node(loop.nodes[0])


def traces() -> dict[str, list[str]]:
    """What a cluster could leave on the machine: processes, mounts, links, cgroups."""
    own = {"slurmd", "slurmctld", "munged", "unshare", "slurmstepd:", "srun", "bash", ":"}
    running = [f"{p.pid} {p.started}" for p in processes.every() if p.command.split(" ")[0] in own and ours(p)]
    freezer = Path("/sys/fs/cgroup/freezer")
    return {
        "processes": running,
        "mounts": Path("/proc/self/mounts").read_text().splitlines(),
        "links": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "cgroups": sorted(path.name for path in freezer.glob("slurm_*")) if freezer.exists() else [],
    }


def ours(process: processes.Process) -> bool:
    """Whether the process sees a cluster of tests: by its mount of /etc/hosts."""
    try:
        return "mf-slurm-" in Path(f"/proc/{process.pid}/mountinfo").read_text()
    except OSError:
        return False
