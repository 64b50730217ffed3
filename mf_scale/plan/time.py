"""How long a run takes, and how many CPU cores must feed it: arithmetic on rates that were measured or given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mf_scale.config.schema import Config


@dataclass(frozen=True)
class Rate:
    """Images a second, and where the number comes from."""

    value: float
    source: str
    """given, or measured and on what."""


@dataclass(frozen=True)
class Duration:
    """Of the whole run."""

    steps: int
    images: int
    epochs: float | None
    """Over all sources together; None: their sizes are unknown."""
    gpu: Rate | None
    """Of one GPU."""
    total: float | None
    """Images a second of all GPUs, if each keeps its rate."""
    hours: float | None
    """Of training alone: without the start, validation, evaluation and what a lost node costs."""


@dataclass(frozen=True)
class Cores:
    """What the data path needs."""

    worker: Rate | None
    """Of one loader process, which takes one core."""
    workers: int | None
    """Loader processes of the whole run that keep all GPUs busy."""
    a_rank: int | None
    """data.workers, at least."""
    a_node: int | None
    """Cores of a node: the loader processes and one for each rank itself."""
    configured: float | None
    """Images a second that data.workers of the configuration makes in all ranks together."""


def duration(config: Config, ranks: int, images: int | None, gpu: Rate | None) -> Duration:
    """Of the run; `images` of all sources."""
    seen = config.train.steps * config.train.global_batch
    total = gpu.value * ranks if gpu else None
    return Duration(
        steps=config.train.steps,
        images=seen,
        epochs=seen / images if images else None,
        gpu=gpu,
        total=total,
        hours=seen / total / 3600 if total else None,
    )


def cores(config: Config, ranks: int, nodes: int, total: float | None, worker: Rate | None) -> Cores:
    """That make `total` images a second."""
    if worker is None:
        return Cores(None, None, None, None, None)
    configured = worker.value * max(1, config.data.workers) * ranks
    if total is None:
        return Cores(worker, None, None, None, configured)
    a_rank = math.ceil(total / ranks / worker.value)
    per_node = -(-ranks // nodes)
    return Cores(worker, a_rank * ranks, a_rank, (a_rank + 1) * per_node, configured)
