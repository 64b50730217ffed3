"""Who am I among the ranks: torchrun's variables, SLURM's, or a single process. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mf_scale.errors import UserError

RENDEZVOUS = "MF_RENDEZVOUS"
"""Environment variable with a file the ranks of one machine meet at (set by `mf-scale train --processes`)."""


@dataclass(frozen=True)
class World:
    """The ranks of a run and this process's place among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """True on the one rank that writes and prints."""
        return self.rank == 0


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World:
    """Rank facts of RANK/WORLD_SIZE/LOCAL_RANK, else of a SLURM step, else a single process; raises UserError."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if names[0] in environment and (names[0] == "RANK" or "SLURM_STEP_ID" in environment):
            return _read(environment, *names)
    return World()


def _read(environment: Mapping[str, str], *names: str) -> World:
    try:
        rank, size, local_rank = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the environment names a rank but not its place: {' '.join(names)} are all needed as numbers",
            where=f"{type(error).__name__}: {error}",
            remedy="Start through launch/multinode.sh, torchrun, or mf-scale train --processes N.",
        ) from error
    if not 0 <= rank < size:
        raise UserError(f"{names[0]}={rank} does not lie below {names[1]}={size}", where="environment")
    return World(rank, size, local_rank)


@dataclass(frozen=True)
class JobStart:
    """Which start of which SLURM job this process belongs to."""

    job: str
    """Its id; of a task of an array ARRAY_TASK, as SLURM's commands print it."""
    restart: int
    """How often SLURM has requeued it."""


def job_start(environment: Mapping[str, str] = os.environ) -> JobStart | None:
    """The start this process belongs to; None outside a job."""
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        return None
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return JobStart(f"{array}_{task}" if array and task else job, int(restart) if restart.isdecimal() else 0)


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """GPUs this process may use, counted without loading torch."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([part for part in chosen.split(",") if part.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
