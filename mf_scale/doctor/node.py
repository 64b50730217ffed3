"""What one node says of itself: collected by the first rank of each, so that two ranks do not measure each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mf_scale.config.schema import Config
from mf_scale.data.index import Index
from mf_scale.data.sources import open_training, open_validation
from mf_scale.distributed.env import World, job_start
from mf_scale.doctor.gpus import smi_facts
from mf_scale.doctor.host import host_facts
from mf_scale.doctor.kernels import kernel_facts
from mf_scale.doctor.run_directory import WRITE_SECONDS, directory_facts, unanswered
from mf_scale.doctor.shards import READ_SECONDS, SIZE_SECONDS, shard_facts
from mf_scale.doctor.versions import version_facts
from mf_scale.doctor.watch import Watch, within
from mf_scale.errors import FaultError, UserError

_ANSWER_SECONDS = 8.0
"""Beyond what a look is meant to take: then the file system hangs."""


@dataclass
class Sources:
    """The data of a configuration as this node sees it."""

    training: tuple[Index, ...] = ()
    validation: Index | None = None
    failure: UserError | None = None

    @property
    def all(self) -> list[Index]:
        """Training and validation sources that could be opened."""
        return [*self.training, *([self.validation] if self.validation is not None else [])]


@dataclass
class Node:
    """What was found out before the ranks meet."""

    facts: dict[str, Any]
    """Of this rank, JSON values: reports that are gathered and judged on rank 0."""
    sources: Sources = field(default_factory=Sources)


def look_around(config: Config | None, world: World, watch: Watch) -> Node:
    """The facts of this rank; those of its node too where it is the node's first."""
    facts: dict[str, Any] = {
        "rank": world.rank,
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "pid": os.getpid(),
        "gpu_files": _gpu_files(),
        "versions": version_facts(),
    }
    node = Node(facts)
    if facts["gpu_files"] and not torch.cuda.is_available():
        facts["cuda_error"] = _cuda_error()
    if world.local_rank != 0:
        return node
    with watch.at("this node's limits"):
        facts["node"] = host_facts()
        facts["smi"] = smi_facts()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with watch.at("the kernels"):
        facts["kernels"] = _or_error(lambda: kernel_facts(config or Config(), device))
    if config is not None:
        with watch.at("the run directory"):
            facts["directory"] = _directory(Path(config.run_dir), world.rank)
        with watch.at("the shards"):
            node.sources = _opened(config)
            facts["shards"] = _shards(node.sources, world.rank)
    return node


def _gpu_files() -> int:
    """GPUs that this process is meant to see: a job that asked for none still has their files on a node with some."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    unasked = "SLURM_JOB_ID" in os.environ and not {"SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS"} & os.environ.keys()
    return 0 if hidden or unasked else len(list(Path("/dev").glob("nvidia[0-9]*")))


def _cuda_error() -> str:
    try:
        torch.zeros(1, device="cuda")
    except Exception as error:  # whatever the driver says is what is wanted
        return " ".join(str(error).split())[:300]
    return ""


def _or_error(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except UserError as error:
        return {"error": [error.what, error.where, error.remedy]}


def _directory(folder: Path, rank: int) -> dict[str, Any]:
    limit = WRITE_SECONDS + _ANSWER_SECONDS
    try:
        return within(limit, "the run directory", lambda: directory_facts(folder, rank=rank))
    except FaultError as error:
        return unanswered(folder, error.what)


def _opened(config: Config) -> Sources:
    """Every source that can be opened; the first mistake of those that cannot."""
    sources = Sources()
    try:
        sources.training = within(_ANSWER_SECONDS, "the training sources", lambda: open_training(config.data))
    except UserError as error:
        sources.failure = error
    vocabulary = sources.training[0].vocabulary if sources.training else None
    try:
        sources.validation = within(
            _ANSWER_SECONDS, "the validation source", lambda: open_validation(config.data, vocabulary)
        )
    except UserError as error:
        sources.failure = sources.failure or error
    return sources


def _shards(sources: Sources, rank: int) -> dict[str, Any]:
    if sources.failure is not None:
        return _error(sources.failure)
    start = job_start()
    turn = f"{start.job}-{start.restart}-{rank}" if start is not None else f"{os.getpid()}-{rank}"
    limit = READ_SECONDS + SIZE_SECONDS + _ANSWER_SECONDS
    try:
        return within(limit, "the shards", lambda: shard_facts(sources.all, turn))
    except UserError as error:
        return _error(error)


def _error(error: UserError) -> dict[str, Sequence[Any]]:
    return {"error": [error.what, error.where, error.remedy, isinstance(error, FaultError)]}
