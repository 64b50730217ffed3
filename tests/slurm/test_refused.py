"""What cannot work is refused in the first second of a job, or before it is submitted, with the remedy."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

from tests.integration.program import Run
from tests.slurm.jobs import ENVIRONMENT, ROOT, SCRIPT, Training
from tests.slurm.testbed import Cluster

TWO = ("--nodes=2", "--ntasks-per-node=1")


def refused(training: Training, said: str, *, code: int = 2) -> None:
    assert training.until_ended(60) == code, training.log
    assert said in training.log, training.log
    assert "Traceback" not in training.log
    assert not training.run.records(), "ranks were started"


def test_what_cannot_work_is_refused_before_the_ranks_start(cluster: Cluster, tmp_path: Path, packed: Path) -> None:
    def job(name: str, *options: str, overrides: tuple[str, ...] = (), **environment: str) -> Training:
        return Training(cluster, Run(tmp_path / name, packed)).submit(*options, overrides=overrides, **environment)

    refused(job("gpus", *TWO, "--gpus-per-node=2"), "fewer tasks than GPUs: 1 tasks, 2 GPUs")
    refused(job("batch", "--nodes=3", "--ntasks-per-node=1"), "train.global_batch = 8 cannot be shared by 3 ranks")
    refused(job("key", *TWO, overrides=("train.stps=3",)), "train.stps is not a key")
    refused(job("python", *TWO, MF_PYTHON=str(tmp_path / "gone/bin/python")), "there is no python at")


def test_a_node_that_differs_is_named(cluster: Cluster, tmp_path: Path, packed: Path) -> None:
    odd = cluster.nodes[1]

    def job(name: str, folder: Path = tmp_path, *more: str, **environment: str) -> Training:
        folder.mkdir(exist_ok=True)
        training = Training(cluster, Run(folder / name, packed))
        return training.submit(*TWO, f"--nodelist={cluster.nodes[0]},{odd}", overrides=more, **environment)

    unshared = tmp_path / "unshared"
    unshared.mkdir()
    cluster.hide(odd, unshared)
    refused(job("run", unshared), f"{odd} does not see what the head node wrote into the run directory")
    cluster.unhide(odd)

    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    cluster.hide(odd, python.parent)
    refused(job("venv", MF_PYTHON=str(python)), f"{odd} cannot start")
    cluster.unhide(odd)

    cluster.skew_clock(odd, 60)
    refused(job("clock"), f"the clock of {odd} is 60 s ahead of that of the head node")
    cluster.skew_clock(odd, 0)

    other = tmp_path / "other.py"
    other.write_text((ROOT / "mf_scale/errors.py").read_text() + "# another version\n")
    cluster.overlay(odd, ROOT / "mf_scale/errors.py", other)
    refused(job("code", tmp_path, "--live-code"), f"{odd} has another version of the program than the head node")
    cluster.unhide(odd)


def test_a_submission_is_checked_and_kept_before_the_queue(cluster: Cluster, tmp_path: Path, packed: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(ROOT / "mf_scale", root / "mf_scale", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "launch", root / "launch")
    environment = {**ENVIRONMENT, "MF_ROOT": str(root)}
    del environment["MF_DOCTOR"]  # as everybody has it
    training = Training(cluster, Run(tmp_path / "run", packed))
    config = tmp_path / "mine.yaml"
    config.write_text(f"base: {ROOT / 'configs/base.yaml'}\n")
    words = [str(root / "launch/singlenode.sh"), "--hold",
             f"--output={tmp_path}/run.log", "--", str(config), *training.words("train.steps=3")[1:]]  # fmt: skip

    wrong = cluster.login("bash", *words, "train.stps=3", env=environment, cwd=tmp_path, check=False)
    assert wrong.returncode == 2 and "train.stps is not a key" in wrong.stderr
    assert not cluster.squeue()

    submitted = cluster.login("bash", *words, env=environment, cwd=tmp_path)
    training.job = int(submitted.stdout.split()[-1])
    config.write_text("run_dir: nonsense\n")
    (root / "mf_scale/cli.py").write_text("raise SystemExit('the edited program')\n")
    (root / "launch/job.sh").write_text("exit 9\n")
    cluster.scontrol("release", str(training.job))
    assert training.until_ended(120) == 0, training.log
    assert training.run.last_step() == 3
    assert "the edited program" not in training.log
    # Asked by default, of all ranks, before they train; quick, and quiet where all is well.
    said = re.search(r"mf-scale doctor · .* · 2 ranks on (\w+) · ([\d.]+) s: (.*)", training.log)
    assert said and said[1] in cluster.nodes and float(said[2]) < 30, training.log
    assert "problem" not in said[3] and "run directory" not in training.log, training.log


def test_an_edit_after_the_submission_is_not_trained(cluster: Cluster, tmp_path: Path, packed: Path) -> None:
    training = Training(cluster, Run(tmp_path / "run", packed))
    config = tmp_path / "mine.yaml"
    config.write_text(f"base: {ROOT / 'configs/base.yaml'}\n")
    words = [*TWO, "--hold", f"--output={tmp_path}/run.log", str(SCRIPT), str(config), *training.words()[1:]]
    training.job = cluster.sbatch(*words, cwd=tmp_path, env=ENVIRONMENT)
    # Later than what clocks may differ by.
    cluster.wait_until("six seconds", lambda: _age(config) > 6, 20)
    config.write_text(f"base: {ROOT / 'configs/base.yaml'}\nseed: 5\n")
    cluster.scontrol("release", str(training.job))
    refused(training, "mine.yaml changed after the job was submitted")


def _age(file: Path) -> float:
    return time.time() - file.stat().st_mtime
