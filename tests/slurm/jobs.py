"""Real training of a small model through launch/multinode.sh, and what its history must be."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from mf_scale.rundir import RunDir
from mf_scale.tracking.launches import Launch, read_launches
from tests.integration.program import LARGER, SMALL, Run
from tests.slurm.processes import Process
from tests.slurm.testbed import Cluster

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/multinode.sh"
ENVIRONMENT = {"MF_ROOT": str(ROOT), "MF_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MF_DOCTOR": "0"}
"""Of the jobs: the doctor takes a start of its own, so it is on where it is tested."""
STEPS = 40
OURS = [LARGER, "train.global_batch=8", "train.stop_before=0", "checkpoint.every_steps=5", "tracking.wandb=offline"]
"""Two nodes with two ranks each take two samples a rank; the tests' clusters end jobs sooner than stop_before."""


@dataclass
class Training:
    """One job script on one run directory."""

    cluster: Cluster
    run: Run
    job: int = 0

    @property
    def log(self) -> str:
        file = self.run.folder.with_suffix(".log")
        return file.read_text(errors="replace") if file.is_file() else ""

    @property
    def launches(self) -> list[Launch]:
        return read_launches(RunDir(self.run.folder))

    def words(self, *overrides: str) -> list[str]:
        return [str(ROOT / "configs/base.yaml"), *SMALL, *OURS, *self.run.sources, f"train.steps={STEPS}", *overrides]

    def submit(self, *options: str, overrides: tuple[str, ...] = (), **environment: str) -> Training:
        """sbatch [options] launch/multinode.sh ..."""
        folder = self.run.folder.parent
        given = ["--time=10", f"--output={self.run.folder.with_suffix('.log')}", *options, str(SCRIPT)]
        self.job = self.cluster.sbatch(*given, *self.words(*overrides), cwd=folder, env={**ENVIRONMENT, **environment})
        return self

    def until_step(self, step: int, timeout: float = 120) -> None:
        self.cluster.wait_until(f"step {step}", lambda: self.run.last_step() >= step, timeout, self.job)

    def until_started(self, starts: int, timeout: float = 120) -> None:
        """Until the start of that number (from 1) has taken a step."""

        def taken() -> bool:
            begun = [n for n, r in enumerate(self.run.records()) if r["event"] == "start"]
            return len(begun) >= starts and any(r["event"] == "step" for r in self.run.records()[begun[-1] :])

        self.cluster.wait_until(f"a step of start {starts}", taken, timeout, self.job)

    def tasks(self) -> dict[int, Process]:
        """Rank -> process of the start that SLURM knows of, without what an older one left behind."""
        fields = self.cluster.job(self.job)
        found = {}
        for node in self.cluster.nodes_of(self.job) if fields["JobState"] == "RUNNING" else []:
            for rank, process in self.cluster.ranks(self.job, node).items():
                mine = process.environment().get("SLURM_RESTART_COUNT", "0") == fields["Restarts"]
                if mine and "mf_scale.cli train" in process.command:
                    found[rank] = process
        return found

    def until_ended(self, timeout: float = 180) -> int:
        """Until the job is out of the queue; its exit code."""
        gone = lambda: not self.cluster.squeue("%i", f"--jobs={self.job}")  # noqa: E731
        self.cluster.wait_until("the job has ended", gone, timeout, self.job)
        return self.cluster.exit_code(self.job)


def assert_same_history(run: Run, reference: Run, *, exactly: bool = True, steps: int = STEPS) -> None:
    """Every step once, with the keys and the loss of the undisturbed run."""
    keys, wanted = run.series("keys", "keys"), reference.series("keys", "keys")
    assert {step: sorted(of) for step, of in keys.items()} == {step: sorted(of) for step, of in wanted.items()}
    losses, expected = run.series("step", "loss"), reference.series("step", "loss")
    assert list(losses) == list(expected) == list(range(1, steps + 1))
    # On another layout floats are added in another order, which training carries on.
    tolerance = 0.0 if exactly else 0.02
    assert all(abs(losses[step] - expected[step]) <= tolerance * expected[step] for step in expected)
