"""Bytes of a checkpoint's files by ZeRO stage and rank, heads included: as the writer lays out tensors without numbers.

Which rank writes what is `training/contents.py`; here it is said without the engine, for any number of ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mf_scale.fragments import AVERAGE, WEIGHT, tensor_key
from mf_scale.plan.states import FP32, flat_share

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALL = {0: 1024, 1: 1024, 2: 1024, 3: 16}
"""Ranks up to which every rank's file is laid out; beyond, all but the first are taken to have the same head."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class SavedModel:
    """What a checkpoint has of a model, by name."""

    trained: Shapes
    """Parameters in the model's order."""
    frozen: Shapes
    groups: tuple[tuple[int, ...], ...]
    """Positions in `trained` of each parameter group, in the optimizer's order."""
    state: tuple[tuple[str, tuple[int, ...], str], ...]
    """Name, shape and dtype of everything in the state_dict."""


@dataclass(frozen=True)
class Written:
    """Bytes of the tensor files at one ZeRO stage; manifest and settings come on top."""

    stage: int
    first_rank: int
    other_rank: int
    """Of any other rank at most; 0 where there is none."""
    total: int
    """Of many ranks to a hundredth: the values are exact, the heads of their files all like the fullest rank's."""


def list_saved(model: Any, groups: Iterable[Iterable[Any]]) -> SavedModel:
    """Of an nn.Module and its parameters by group of the optimizer."""
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    place = {id(p): number for number, p in enumerate(trained.values())}
    return SavedModel(
        trained=tuple((name, tuple(p.shape)) for name, p in trained.items()),
        frozen=tuple((name, tuple(p.shape)) for name, p in named.items() if name not in trained),
        groups=tuple(tuple(place[id(p)] for p in group) for group in groups),
        state=tuple((name, tuple(t.shape), str(t.dtype)) for name, t in model.state_dict().items()),
    )


def count_written(saved: SavedModel, stage: int, ranks: int, *, ema: bool) -> Written:
    """What the ranks write at a stage."""
    whole = _file(_replicated(saved, stage), {}) * (1 + (ema and stage < 3))
    first = whole + _partition(saved, stage, 0, ranks, ema)
    if ranks == 1:
        return Written(stage, first, 0, first)
    if ranks <= _ALL[stage]:
        others = [_partition(saved, stage, rank, ranks, ema) for rank in range(1, ranks)]
        return Written(stage, first, max(others), first + sum(others))
    fullest = _fullest(saved, stage, ranks)
    largest = _partition(saved, stage, fullest, ranks, ema)
    heads = (ranks - 1) * (largest - _values(saved, stage, fullest, ranks, ema))
    values = _all_values(saved, stage, ema) * FP32 - _values(saved, stage, 0, ranks, ema)
    return Written(stage, first, largest, first + values + heads)


def _values(saved: SavedModel, stage: int, rank: int, ranks: int, ema: bool) -> int:
    """Bytes of a rank's own file without its head."""
    return sum(length for _, (length,) in _pieces(saved, stage, rank, ranks, ema)) * FP32


def _all_values(saved: SavedModel, stage: int, ema: bool) -> int:
    """Elements in the ranks' own files together."""
    trained, frozen = (sum(math.prod(shape) for _, shape in some) for some in (saved.trained, saved.frozen))
    return 2 * trained + ((1 + ema) * trained + frozen) * (stage == 3)


def _fullest(saved: SavedModel, stage: int, ranks: int) -> int:
    """The rank besides 0 that writes most: the first of them, unless whole parameters are dealt out."""
    if stage:
        return 1
    own = [0] * min(ranks, len(saved.trained))
    for number, (_, shape) in enumerate(saved.trained):
        own[number % ranks] += math.prod(shape)
    return max(range(1, len(own)), key=own.__getitem__, default=1)


def _partition(saved: SavedModel, stage: int, rank: int, ranks: int, ema: bool) -> int:
    """Bytes of a rank's own file."""
    pieces = _pieces(saved, stage, rank, ranks, ema)
    shapes = {name: list(shape) for name, shape in _in_order(saved)} if stage == 3 else {}
    return _file([(name, shape, "torch.float32") for name, shape in pieces], {"shapes": json.dumps(shapes)})


def _in_order(saved: SavedModel) -> Shapes:
    """All parameters as the state_dict has them, which is the model's order but for buffers in between."""
    of = dict((*saved.trained, *saved.frozen))
    return tuple((name, of[name]) for name, _, _ in saved.state if name in of)


def _pieces(saved: SavedModel, stage: int, rank: int, ranks: int, ema: bool) -> list[tuple[str, tuple[int]]]:
    """Names on disk and lengths of what one rank alone has."""
    if stage == 3:
        return _sharded(saved, rank, ranks, ema)
    if stage == 0:
        mine = [(name, 0, math.prod(s)) for i, (name, s) in enumerate(saved.trained) if i % ranks == rank]
    else:
        mine = _flat(saved, rank, ranks)
    return [(tensor_key(kind, start, name), (size,)) for name, start, size in mine for kind in _MOMENTS]


def _flat(saved: SavedModel, rank: int, ranks: int) -> list[tuple[str, int, int]]:
    """Name, first element and length of each stretch in a rank's share of the groups, in the model's order."""
    found: dict[int, tuple[str, int, int]] = {}
    for group in saved.groups:
        sizes = [math.prod(saved.trained[number][1]) for number in group]
        share = flat_share(sum(sizes), ranks)
        low, high, at = rank * share, (rank + 1) * share, 0
        for number, size in zip(group, sizes, strict=True):
            start, end = max(low, at), min(high, at + size)
            if end > start:
                found[number] = saved.trained[number][0], start - at, end - start
            at += size
    return [found[number] for number in sorted(found)]


def _sharded(saved: SavedModel, rank: int, ranks: int, ema: bool) -> list[tuple[str, tuple[int]]]:
    """Moments of what is trained, weights of everything, the average."""
    trained = {name for name, _ in saved.trained}
    own = []
    for name, shape in _in_order(saved):
        size = math.prod(shape)
        share = -(-size // ranks)
        if (length := min(share, size - rank * share)) > 0:
            own.append((name, rank * share, length))
    mine = [(tensor_key(kind, at, n), (size,)) for n, at, size in own if n in trained for kind in _MOMENTS]
    mine += [(tensor_key(WEIGHT, at, n), (size,)) for n, at, size in own]
    return mine + [(tensor_key(AVERAGE, at, n), (size,)) for n, at, size in own if ema and n in trained]


def _replicated(saved: SavedModel, stage: int) -> list[tuple[str, tuple[int, ...], str]]:
    """What rank 0 writes of the state_dict: all of it, at stage 3 what is no parameter."""
    parameters = {name for name, _ in (*saved.trained, *saved.frozen)} if stage == 3 else set()
    return [entry for entry in saved.state if entry[0] not in parameters]


def _file(tensors: Iterable[tuple[str, tuple[int, ...], str]], metadata: dict[str, str]) -> int:
    """Bytes of a file with these tensors, as the writer lays it out."""
    import torch

    from mf_scale.training.tensor_file import lay_out

    made = {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        for name, shape, dtype in tensors
    }
    layout = lay_out(made, metadata)
    return len(layout.header) + layout.size
