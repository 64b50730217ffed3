"""Ranks under the variables that srun sets for the tasks of a step, on this machine and without SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mf_scale.distributed.env import RENDEZVOUS

ROOT = Path(__file__).parents[2]


@dataclass
class Step:
    """A step of `size` tasks; its ranks are started one by one."""

    size: int
    restart: int = 0
    children: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self, rank: int, command: Sequence[str], **environment: str) -> None:
        """Start `python COMMAND` as a rank; PATHs and more come in by `environment`."""
        own = {k: v for k, v in os.environ.items() if k not in (RENDEZVOUS, "MASTER_ADDR", "MASTER_PORT")}
        own |= {
            "SLURM_JOB_ID": "41",
            "SLURM_RESTART_COUNT": str(self.restart),
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": "node[1-2]",
            "SLURM_NTASKS": str(self.size),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONSAFEPATH": "1",
        }
        self.children[rank] = subprocess.Popen(
            [sys.executable, *command],
            env=own | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, timeout: float = 60) -> dict[int, tuple[int, str, str]]:
        """Exit code, stdout and stderr of every rank that was started."""
        try:
            told = {rank: child.communicate(timeout=timeout) for rank, child in self.children.items()}
        finally:
            for child in self.children.values():
                if child.poll() is None:
                    child.kill()
                    child.wait()
        return {rank: (self.children[rank].returncode, *told[rank]) for rank in told}
