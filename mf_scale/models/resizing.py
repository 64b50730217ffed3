"""Antialiased resizing whose backward pass repeats bit by bit on CUDA, where torch's own cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_MODES = ("bilinear", "bicubic")


def repeating_resizes(device: torch.device) -> AbstractContextManager[object]:
    """A block in which `F.interpolate(antialias=True)` repeats; empty unless torch was told to be deterministic.

    timm resizes the position embeddings of plain ViTs so in every forward pass, and torch refuses its backward then.
    """
    wanted = device.type == "cuda" and torch.are_deterministic_algorithms_enabled()
    return RepeatingResizes() if wanted else nullcontext()


class RepeatingResizes(TorchFunctionMode):
    """Takes the antialiased calls of F.interpolate to a size over and leaves everything else as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.interpolate and given.get("antialias") and given.get("size") and given.get("mode") in _MODES:
            return resize_by_products(args[0], given["size"], given["mode"], bool(given.get("align_corners")))
        return func(*args, **given)


def resize_by_products(x: Tensor, size: int | tuple[int, int], mode: str, align_corners: bool = False) -> Tensor:
    """x [B,C,h,w] -> [B,C,*size] as F.interpolate with antialias: the filter is separable, so two products do."""
    height, width = (size, size) if isinstance(size, int) else size
    rows = _filter(x.shape[2], height, mode, align_corners, x)
    columns = _filter(x.shape[3], width, mode, align_corners, x)
    with torch.autocast(x.device.type, enabled=False):
        return (rows @ x.float() @ columns.T).to(x.dtype)


def _filter(short: int, long: int, mode: str, align_corners: bool, like: Tensor) -> Tensor:
    """The matrix [long,short] of the filter along one axis: the identity's rows resized, its columns left alone."""
    identity = torch.eye(short, device=like.device)[None, None]
    return F.interpolate(identity, size=(long, short), mode=mode, align_corners=align_corners, antialias=True)[0, 0]
