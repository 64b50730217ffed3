"""Activations made again in the backward pass instead of kept (gradient checkpointing), by stages of a backbone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mf_scale.errors import UserError


def recompute(units: Collection[nn.Module]) -> None:
    """Let each unit keep its inputs only and run again in the backward pass; names and numbers stay as they are.

    Random numbers are drawn alike both times; the running statistics of batch norm move the first time only.
    """
    for unit in units:
        moving = [m for m in unit.modules() if isinstance(m, _BatchNorm)]
        contexts = {"context_fn": functools.partial(_contexts, moving)} if moving else {}
        unit.forward = functools.partial(_run, unit.forward, contexts)


def _run(forward: Callable[..., Any], contexts: dict[str, Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    before = _versions(inputs)
    out = checkpoint(forward, *inputs, use_reentrant=False, **contexts, **named)
    if _versions(inputs) != before:
        raise UserError(
            "a block of the backbone writes over its own input, so it cannot be run again",
            where="model.backbone.recompute_stages",
            remedy="Leave its stage out.",
        )
    return out


def _versions(inputs: Sequence[Any]) -> list[int]:
    """How often each tensor was written to; torch.compile makes writing safe by itself."""
    return [] if torch.compiler.is_compiling() else [t._version for t in inputs if isinstance(t, Tensor)]


def _contexts(moving: list[_BatchNorm]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward, and for running it again."""
    return nullcontext(), _statistics_at_rest(moving)


@contextmanager
def _statistics_at_rest(moving: list[_BatchNorm]) -> Iterator[None]:
    """A batch norm in training normalises with the batch; with momentum 0 its statistics stay, uncounted its counter.

    (Without statistics altogether it would keep other tensors than the first time, which checkpointing refuses.)
    """
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in moving]
    for norm in moving:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, counter in before:
            norm.momentum, norm.num_batches_tracked = momentum, counter


def stage_units(net: nn.Module, ends: Sequence[str]) -> list[list[nn.Module]]:
    """The blocks of each stage. `ends` are the modules that the stages' features come from, in order; else KeyError.

    A block is the outermost module with several parts that have parameters of their own; lone convolutions and norms of
    a stem are none. Its stage is the first whose end is not defined before it.
    """
    modules = dict(net.named_modules())
    position = {id(module): index for index, module in enumerate(modules.values())}
    ended = []
    for name in ends:
        end = modules[name] if name in modules else modules[name.replace(".", "_")]
        ended.append(position[id(end)] + sum(1 for _ in end.modules()) - 1)
    stages: list[list[nn.Module]] = [[] for _ in ends]
    for unit in _units(net):
        stage = next((i for i, last in enumerate(ended) if position[id(unit)] <= last), None)
        if stage is not None:
            stages[stage].append(unit)
    return stages


def quarters(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The blocks of a network without stages, cut in four."""
    return [[b for i, b in enumerate(blocks) if 4 * i // len(blocks) == part] for part in range(4)]


def _units(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict) or hasattr(child, "blocks"):
            yield from _units(child)
        elif sum(1 for part in child.modules() if part is not child and _owns(part)) > 1:
            yield child


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
