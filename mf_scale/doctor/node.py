"""What one node says of itself: collected by the first rank of each, so that two ranks do not measure each other."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mf_scale.config.data_rules import validation_source
from mf_scale.config.schema import Config, DataConfig, SourceConfig
from mf_scale.data.index import Index
from mf_scale.data.sources import open_other, refuse_doubles, training_sources
from mf_scale.data.unified import seen_as_one, seen_in
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
_LEAST_SECONDS = 1.0
"""For each source behind one that hangs: it may lie elsewhere."""


@dataclass
class Sources:
    """The data of a configuration as this node sees it."""

    training: tuple[Index, ...] = ()
    """All of them, or none where one cannot be opened or they do not go together."""
    validation: Index | None = None
    opened: list[Index] = field(default_factory=list)
    """Training and validation sources that could be opened, each by itself."""
    failures: list[tuple[str, UserError]] = field(default_factory=list)
    """Which source, and why it cannot be opened."""
    mistakes: list[UserError] = field(default_factory=list)
    """What keeps those that opened from having one vocabulary."""


@dataclass
class Node:
    """What was found out before the ranks meet; filled bit by bit, so that a part of it can be told."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Of this rank, JSON values: reports that are gathered and judged on rank 0."""
    sources: Sources = field(default_factory=Sources)


def host_name() -> str:
    """Of this node, as SLURM calls it where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look_around(node: Node, config: Config | None, world: World, watch: Watch) -> None:
    """Fill in the facts of this rank; those of its node too where it is the node's first."""
    facts = node.facts
    facts |= {"rank": world.rank, "host": host_name(), "pid": os.getpid(), "gpu_files": _gpu_files()}
    with watch.at("the versions"):
        facts["versions"] = version_facts()
    if facts["gpu_files"] and not torch.cuda.is_available():
        facts["cuda_error"] = _cuda_error()
    if world.local_rank != 0:
        return
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
            facts["vocabularies"] = [_told(error) for error in node.sources.mistakes]


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
    """Every source that can be opened, each by itself, and the mistakes of all that cannot."""
    sources, data = Sources(), config.data
    deadline = time.monotonic() + _ANSWER_SECONDS

    def opened(name: str, what: str, look: Callable[[], tuple[Index, ...]]) -> tuple[Index, ...]:
        try:
            return within(max(_LEAST_SECONDS, deadline - time.monotonic()), what, look)
        except UserError as error:
            sources.failures.append((name, error))
            return ()

    def together(what: str, look: Callable[[], tuple[Index, ...]]) -> tuple[Index, ...]:
        try:
            return within(max(_LEAST_SECONDS, deadline - time.monotonic()), f"what is said of {what}", look)
        except UserError as error:
            sources.mistakes.append(error)
            return ()

    try:
        named = training_sources(data)
    except UserError as error:
        named = []
        sources.failures.append(("data.train", error))
    for source in named:
        sources.opened += opened(source.index, f"the training source {source.index}", _alone(source, data))
    training = tuple(sources.opened)
    try:
        refuse_doubles(training)
    except UserError as error:
        sources.failures.append(("data.sources", error))
        named = []
    # Bands are left to the check of labels, which counts the images of each class anyway and has longer for it.
    plain = replace(data, bands=False)
    if named and len(training) == len(named):
        sources.training = together("the training sources", lambda: seen_as_one(training, plain))
    other = validation_source(data)
    if other is None:
        return sources
    seen = alone = opened(other.index, f"the validation source {other.index}", _alone(other, data))
    sources.opened += alone
    if alone and sources.training:
        vocabulary = sources.training[0].vocabulary
        seen = together("the validation source", lambda: (seen_in(vocabulary, alone[0], other, plain, "data.val"),))
    sources.validation = seen[0] if seen else None
    return sources


def _alone(source: SourceConfig, data: DataConfig) -> Callable[[], tuple[Index, ...]]:
    return lambda: (open_other(source, data, None, source.index),)


def _shards(sources: Sources, rank: int) -> dict[str, Any]:
    """What those that opened say, and beside it {"errors": [source, what, where, remedy, fault] of each that did not}.

    Nothing of shards is in it where no source opened.
    """
    failures = list(sources.failures)
    facts: dict[str, Any] = {}
    start = job_start()
    turn = f"{start.job}-{start.restart}-{rank}" if start is not None else f"{os.getpid()}-{rank}"
    limit = READ_SECONDS + SIZE_SECONDS + _ANSWER_SECONDS
    if sources.opened:
        try:
            facts = within(limit, "the shards", lambda: shard_facts(sources.opened, turn))
        except UserError as error:
            failures.append(("", error))
    return {**facts, "errors": [[source, *_told(error)] for source, error in failures]}


def _told(error: UserError) -> list[Any]:
    return [error.what, error.where, error.remedy, isinstance(error, FaultError)]
