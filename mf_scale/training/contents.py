"""What a checkpoint holds of the tensors of a run, and which rank writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable

from torch import Tensor

from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World
from mf_scale.fragments import Fragment, partition_file, tensor_key
from mf_scale.rundir import EMA, WEIGHTS
from mf_scale.training.ema import Ema
from mf_scale.training.snapshot import FileContents


def contents(engine: Engine, ema: Ema | None, world: World) -> list[FileContents]:
    """The files this rank writes, as views into live memory.

    Rank 0 writes what every rank has whole, each rank the stretches that it alone has. Nothing is gathered.
    """
    partitioned = engine.stage == 3
    files = []
    if world.first:
        files.append(FileContents(WEIGHTS, engine.replicated(), {}))
        if ema is not None and not partitioned:
            files.append(FileContents(EMA, ema.state(), {}))
    tensors = _named(engine.owned_fragments())
    if ema is not None and partitioned:
        tensors |= _named(ema.fragments())
    return [
        *files,
        FileContents(partition_file(world.rank, world.size), tensors, {"shapes": json.dumps(engine.shapes())}),
    ]


def _named(fragments: Iterable[Fragment]) -> dict[str, Tensor]:
    return {tensor_key(kind, f.start, f.name): values for f in fragments for kind, values in f.values.items()}
