"""The mask loss on a GPU: three launches for all layers and images, whatever their number and that of the segments.

First pass: sums of every lane (a quad column of a pair, in a band of rows). Then a pair's sums, losses, coefficients.
Second pass: the gradient, made anew from logits and map rather than from anything kept. Beside logits and gradient
there are only the lanes' sums: at 160 x 160 a twentieth of the logits' bytes for 16 images, a quarter for 2. Everything
is computed in fp32 and added in a fixed order, so the same input gives the same bits on the same kind of device.

Floor per output pixel and pass: three transcendentals, one map element (from the caches: all pairs of an image share
them) and h w / (H W) of a logit. ptxas makes 27 instructions of it in the first pass and 32 in the second on sm_90. For
16 images x 90 pairs, 160 -> 640, that is twice 590 M pixels, and 0.44 GB of logits read twice and gradient written:
0.77 and 0.94 ms on an H100, half its rate of transcendentals (4.1 T/s), the rest being the other instructions.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from mf_scale.data.batch import IGNORE
from mf_scale.kernels.settings import Settings
from mf_scale.kernels.targets import check_shapes

_LANES = 128
_BLOCKS_WANTED = 2048
"""Blocks of a launch that keep a large GPU busy to the end; a band is no shorter than _LEAST_ROWS rows of cells.

On an H100 (16 images x 90 pairs, 160 -> 640) both passes take 1.81 ms with 512, 1.70 with 2048, 1.65 with 4096, whose
sums take up to twice the memory. Blocks of 64 or 256 lanes, or two lanes a thread, change less or are slower.
"""
_LEAST_ROWS = 8
_FINISH_BLOCK = 512
LAUNCH = {"enable_fp_fusion": True}
"""Of every launch: multiply and add in one instruction, which Triton 3.10 no longer does of itself."""


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
    """Focal and dice loss [B,P] in fp32, and the gradient [B,P,h,w] in fp32 of their weighted sum.

    `logits` [B,P,h,w] fp32, bf16 or fp16; `segment_map` [B,L,H,W] int16, or uint8 with the same values modulo 256
    (NONE 255, IGNORE 254); `segments`, `layers` [B,P]; `counts` [B]: pairs behind it give zeros. Any ratio of H, W to
    h, w. Raises ValueError for what does not fit. Source: MaskFormer section 3.3; eager.mask_loss computes the same.

    A map of bytes serves T <= 254 only and T is not known here: reading `segments` would wait for the GPU. The matching
    cost, which comes first and knows T, refuses the others.
    """
    from mf_scale.kernels import triton_common
    from mf_scale.kernels import triton_mask_kernels as kernels

    check_shapes(logits, segment_map, segments, layers, counts)
    logits, segment_map = logits.contiguous(), segment_map.contiguous()
    segments, layers, counts = segments.contiguous(), layers.contiguous(), counts.contiguous()
    (B, P, h, w), (L, H, W) = logits.shape, segment_map.shape[1:]
    focal, dice = (torch.empty(B, P, dtype=torch.float32, device=logits.device) for _ in range(2))
    gradient = torch.empty(logits.shape, dtype=torch.float32, device=logits.device) if want_gradient else None
    if B * P == 0:
        return focal, dice, gradient
    form = {
        "GAMMA": float(settings.gamma),
        "EXCLUDE": settings.exclude,
        "IGNORE": ignore_value(segment_map),
        "LAYERED": L > 1,
        "COLUMNS": -(-W // w),
        "LANES": _LANES,
        "num_warps": _LANES // 32,
        **LAUNCH,
        "GPU": not triton_common.INTERPRETED,
    }
    bands, band_rows = _bands(B, P, h, w)
    lanes = bands * (w + 1)
    sums = logits.new_empty((B, P, 5 if settings.exclude else 4, lanes), dtype=torch.float32)
    coefficients = logits.new_empty((B, P, 4), dtype=torch.float32)
    pairs = (logits, segment_map, segments, layers, counts)
    shape = (P, h, w, L, H, W, band_rows)
    with on_device(logits):
        kernels.mask_loss_sums[(-(-P * (w + 1) // _LANES), bands, B)](
            *pairs, sums, *shape, float(settings.alpha), **form
        )
        kernels.mask_loss_finish[(P, B)](
            sums,
            focal,
            dice,
            coefficients,
            P,
            lanes,
            H * W,
            float(settings.alpha),
            float(settings.focal_weight),
            float(settings.dice_weight),
            EXCLUDE=settings.exclude,
            BLOCK=_FINISH_BLOCK,
            **LAUNCH,
        )
        if gradient is not None:
            grid = (-(-P * (w + 1) // (_LANES - 1)), bands, B)
            kernels.mask_loss_gradient[grid](*pairs, coefficients, gradient, *shape, **form)
    return focal, dice, gradient


def _bands(B: int, P: int, h: int, w: int) -> tuple[int, int]:
    """How many bands a pair's h + 1 quad rows are cut into, and their height. Depends on the shape alone."""
    blocks = max(1, B * P * (w + 1) // _LANES)
    bands = max(1, min(-(-_BLOCKS_WANTED // blocks), h // _LEAST_ROWS))
    height = -(-(h + 1) // bands)
    return -(-(h + 1) // height), height


def ignore_value(segment_map: Tensor) -> int:
    """How a map of this type writes IGNORE; NONE is one more."""
    return IGNORE % 256 if segment_map.dtype == torch.uint8 else IGNORE


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
