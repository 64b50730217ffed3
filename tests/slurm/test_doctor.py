"""What the doctor finds decides over the job: a mistake ends it, a sick node is tried again, and it holds nobody up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.program import Run
from tests.slurm.jobs import Training
from tests.slurm.testbed import Cluster

TWO = ("--nodes=2", "--ntasks-per-node=1")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_mistake_ends_a_job_a_sick_node_brings_it_back_and_a_late_doctor_lets_it_go_on(
    cluster: Cluster, tmp_path: Path, packed: Path
) -> None:
    altered, elsewhere = tmp_path / "altered", tmp_path / "elsewhere"
    for folder in (altered, elsewhere):
        shutil.copytree(packed, folder)
    shard = next((altered / "train").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    mistake = Training(cluster, Run(tmp_path / "mistake", altered)).submit(*TWO, MF_DOCTOR="1")
    assert mistake.until_ended(120) == 2, mistake.log
    assert "has another checksum: it was altered" in mistake.log and not mistake.run.records()
    assert [launch.then for launch in mistake.launches] == ["final"]

    odd = cluster.nodes[1]
    cluster.hide(odd, elsewhere)
    nodes = (*TWO, f"--nodelist={cluster.nodes[0]},{odd}")
    twice = ("launch.fruitless_starts=2",)
    sick = Training(cluster, Run(tmp_path / "sick", elsewhere)).submit(*nodes, overrides=twice, MF_DOCTOR="1")
    assert sick.until_ended(240) == 75, sick.log
    cluster.unhide(odd)
    assert f"{odd} cannot open a source that the other nodes can" in sick.log and not sick.run.records()
    assert [launch.then for launch in sick.launches] == ["requeued", "given up"]

    steps = ("train.steps=3",)
    late = Training(cluster, Run(tmp_path / "late", packed))
    late.submit(*TWO, overrides=steps, MF_DOCTOR="1", MF_DOCTOR_SECONDS="1")
    assert late.until_ended(120) == 0, late.log
    assert "the doctor came to no end within 1 s" in late.log and late.run.last_step() == 3
