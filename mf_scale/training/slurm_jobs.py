"""Whether SLURM still runs a job: asked only where a job holds a run directory that another one wants."""

from __future__ import annotations

import subprocess

_SECONDS = 10.0
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
_ENDED |= {"OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
"""States from which a job does not come back; in every other one it runs, ends just now or waits to run again."""


def still_known(job: str) -> bool:
    """False where SLURM says that the job has ended or that there is none; True too where SLURM does not answer."""
    command = ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if answer.returncode != 0:
        return "Invalid job id" not in answer.stderr
    return any(state not in _ENDED for state in answer.stdout.split())
