"""launch/pack.sh: the tasks of an array share a pack; one that runs out of time comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.packing import ROOT, SAMPLE, SLOW, files_of, pack, wait_until

pytestmark = pytest.mark.integration


def start_task(target: Path, python: str = sys.executable, **environment: str) -> subprocess.Popen[str]:
    """One task, as SLURM starts it."""
    return subprocess.Popen(
        ["bash", str(ROOT / "launch/pack.sh"), "coco_panoptic", str(SAMPLE), str(target), "--split", "val",
         "--shard-size", "1"],
        env={**os.environ, "MF_ROOT": str(ROOT), "MF_PYTHON": python, "SLURM_CPUS_PER_TASK": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def array(number: int, first: int, last: int, count: int) -> dict[str, str]:
    values = {"ID": number, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "val"
    assert pack(target, "--shard-size", "1") == 0
    return target


def test_the_tasks_of_an_array_share_a_pack(single, tmp_path):
    tasks = [start_task(tmp_path / "out", **array(number, 4, 6, 3)) for number in (4, 5, 6)]
    said = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    assert files_of(tmp_path / "out") == files_of(single)


def test_some_tasks_again_and_arrays_with_gaps(tmp_path):
    gaps = start_task(tmp_path / "out", **array(7, 3, 7, 2))
    assert "set PARTS" in gaps.communicate(timeout=60)[1] and gaps.returncode == 2 and not (tmp_path / "out").exists()
    again = start_task(tmp_path / "out", PARTS="13", **array(7, 3, 7, 2))
    assert "part 7 of 13 of this pack is done" in again.communicate(timeout=60)[0] and again.returncode == 0
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["val-000007.tar"]


def test_without_an_array_it_packs_all(single, tmp_path):
    task = start_task(tmp_path / "out")
    assert "packed 13 samples" in task.communicate(timeout=60)[0] and task.returncode == 0
    assert files_of(tmp_path / "out") == files_of(single)


def slurm(folder: Path, **facts: str) -> dict[str, str]:
    """A `scontrol` that says these facts of any job and writes down what else it is asked, a python that packs slowly;
    the environment of a task that finds them."""
    told = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0", "Requeue": "1", **facts}
    (folder / "facts").write_text(" ".join(f"{name}={value}" for name, value in told.items()))
    scontrol = f"""case "$*" in
"show job "*) cat {folder}/facts ;;
show*) echo n1 ;;
*) echo "$@" >> {folder}/asked ;;
esac"""
    python = f"""[ $2 = data_tools ] || exec {sys.executable} "$@"
shift 2
exec {sys.executable} -c '{SLOW}' "$@"
"""
    (folder / "bin").mkdir()
    for name, text in (("scontrol", scontrol), ("python", python)):
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "42", "SLURM_JOB_NODELIST": "n1", **array(0, 0, 0, 1)}
    return {"PATH": f"{folder}/bin:{os.environ['PATH']}", **job}


def asked(folder: Path) -> str:
    return (folder / "asked").read_text() if (folder / "asked").exists() else ""


def test_a_task_out_of_time_is_requeued_and_goes_on(single, tmp_path):
    task = start_task(tmp_path / "out", str(tmp_path / "bin/python"), **slurm(tmp_path))
    wait_until(lambda: len(list((tmp_path / "out").glob("*.tar"))) > 2, task)
    os.kill(task.pid, signal.SIGUSR1)
    said = task.communicate(timeout=60)
    # Not `requeue 42`: the plain number of an array's last task is that of the array.
    assert "out of time: the job is requeued" in said[1] and asked(tmp_path) == "requeue 42_0\n"
    assert task.returncode != 0 and 2 < len(list((tmp_path / "out").glob("*.tar"))) < 13
    task = start_task(tmp_path / "out")
    task.communicate(timeout=60)
    assert task.returncode == 0 and files_of(tmp_path / "out") == files_of(single)


def test_a_task_that_was_cancelled_stays_away(tmp_path):
    """As scancel does it: TERM to the job script, while the controller already tells of the end."""
    task = start_task(tmp_path / "out", str(tmp_path / "bin/python"), **slurm(tmp_path, JobState="CANCELLED"))
    wait_until(lambda: len(list((tmp_path / "out").glob("*.tar"))) > 1, task)
    os.kill(task.pid, signal.SIGTERM)
    said = task.communicate(timeout=60)
    assert "cancelled" in said[1] and asked(tmp_path) == "" and task.returncode != 0
    assert len(list((tmp_path / "out").glob("*.tar"))) < 13


def test_mistakes_end_with_2(tmp_path):
    task = start_task(tmp_path / "out", "/nowhere/python")
    assert "there is no python at /nowhere/python" in task.communicate(timeout=60)[1] and task.returncode == 2
