"""The CPU kernels of native.cpp, called through ctypes; native_build.py makes the library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mf_scale.kernels.native_build import library
from mf_scale.kernels.settings import Settings
from mf_scale.kernels.targets import checked_targets

BLOCK = 512
"""Pixels that `PairSums` adds up in fp32 (BLOCK of native.cpp): fed in multiples of it, no cut changes a bit."""


def mask_loss(
    logits: Tensor,
    segment_map: Tensor,
    segments: Tensor,
    layers: Tensor,
    counts: Tensor,
    settings: Settings,
    *,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Focal and dice loss [B,P] of fp32 logits [B,P,h,w], and the gradient [B,P,h,w] of their weighted sum.

    `segment_map` [B,L,H,W] int16, or uint8 with the same values modulo 256 for T <= 254; `segments`, `layers` [B,P];
    `counts` [B]: pairs behind it give zeros. Raises ValueError for what does not fit, MemoryError and
    NoNativeLibraryError.
    """
    _require_cpu(logits, torch.float32)
    logits = logits.contiguous()
    targets = checked_targets(logits, segment_map, segments, layers, counts)
    (B, P, h, w), (L, H, W) = logits.shape, segment_map.shape[1:]
    # Of the logits' type and device: torch's defaults may be others.
    focal, dice = logits.new_zeros(B, P), logits.new_zeros(B, P)
    gradient = logits.new_zeros(logits.shape) if want_gradient else None
    _call(
        library().mf_mask_loss,
        *map(_address, (logits, *targets, focal, dice, gradient)),
        *map(ctypes.c_int, (B, P, h, w, L, H, W)),
        *map(ctypes.c_float, settings[:4]),
        ctypes.c_int(settings.exclude),
        ctypes.c_int(torch.get_num_threads()),
    )
    return focal, dice, gradient


class PairSums:
    """Sums over pixels for N queries and T segments of one image, fed a block of pixels at a time."""

    def __init__(self, queries: int, segment_layer: Tensor, alpha: float, gamma: float, exclude: bool) -> None:
        """`segment_layer` [T]: the layer of the map in which each segment is counted."""
        segments = len(segment_layer)
        self._queries, self._segment_layer, self._settings = queries, segment_layer, (alpha, gamma, exclude)
        self.inside_focal = torch.zeros(segments, queries, dtype=torch.float64, device="cpu")
        """[T,N]: over the segment's pixels, focal term for target 1 minus the one for target 0."""
        self.inside_mass = torch.zeros_like(self.inside_focal)
        """[T,N]: over the segment's pixels, probability."""
        self.outside = torch.zeros(queries, dtype=torch.float64, device="cpu")
        """[N]: over all counted pixels, focal term for target 0."""
        self.mass = torch.zeros_like(self.outside)
        """[N]: over all counted pixels, probability."""

    def add(self, logits: Tensor, maps: Tensor, start: int) -> None:
        """`logits` fp32 [n,N] of pixels start..start+n of `maps`, int16 [L,hw].

        Raises ValueError for what does not fit and MemoryError, after which the sums mean nothing.
        """
        _require_cpu(logits, torch.float32)
        _require_cpu(maps, torch.int16)
        if logits.shape[1:] != (self._queries,) or not 0 <= start <= maps.shape[1] - len(logits):
            raise ValueError(f"logits {list(logits.shape)} from {start} on do not fit maps {list(maps.shape)}")
        alpha, gamma, exclude = self._settings
        logits, maps = logits.contiguous(), maps.contiguous()
        layer = self._segment_layer.clamp(0, len(maps) - 1).to("cpu", torch.int64).contiguous()
        _call(
            library().mf_pair_sums,
            _address(logits),
            ctypes.c_int(len(logits)),
            ctypes.c_int64(self._queries),
            _address(maps[:, start:]),
            ctypes.c_int64(maps.shape[1]),
            _address(layer),
            *map(ctypes.c_int, (len(maps), len(layer))),
            *map(ctypes.c_float, (alpha, gamma)),
            ctypes.c_int(exclude),
            *map(_address, (self.inside_focal, self.inside_mass, self.outside, self.mass)),
            ctypes.c_int(torch.get_num_threads()),
        )


def _require_cpu(tensor: Tensor, dtype: torch.dtype) -> None:
    """What is read by its address must be what the kernel takes it for."""
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(f"the native kernels take {dtype} on the cpu, not {tensor.dtype} on {tensor.device}")


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    """0 is success; the kernels fail for want of memory alone."""
    if function(*arguments) != 0:
        raise MemoryError("the native kernels had no memory for their work")


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
