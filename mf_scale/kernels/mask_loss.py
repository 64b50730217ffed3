"""The mask loss as one operator of torch: focal, dice and their gradient in one pass, whatever kernel computes it.

A custom op, so that torch.compile keeps it in its graph as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mf_scale.kernels import eager, native, triton_mask_loss
from mf_scale.kernels.settings import Settings


def run(
    kernels: str,
    logits: Tensor,
    segment_map: Tensor,
    segments: Tensor,
    layers: Tensor,
    counts: Tensor,
    settings: Settings,
    *,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Focal and dice loss [B,P] and the gradient [B,P,h,w] of their weighted sum by the named kernels.

    Computed in fp32 from logits of any float type, from fp64 logits (eager only) in fp64.
    """
    targets = (segment_map, segments, layers, counts)
    if kernels == "triton":
        return triton_mask_loss.mask_loss(logits, *targets, settings, want_gradient=want_gradient)
    if kernels == "native":
        return native.mask_loss(logits.float(), *targets, settings, want_gradient=want_gradient)
    return eager.mask_loss(wide(logits), *targets, settings, want_gradient=want_gradient)


def wide(tensor: Tensor) -> Tensor:
    """At least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.library.custom_op("mf_scale::mask_loss", mutates_args=())
def mask_loss(
    logits: Tensor,
    segment_map: Tensor,
    segments: Tensor,
    layers: Tensor,
    counts: Tensor,
    focal_weight: float,
    dice_weight: float,
    alpha: float,
    gamma: float,
    exclude: bool,
    kernels: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, focal [B,P], dice [B,P], gradient of the total [B,P,h,w] or an empty tensor); total is differentiable.

    `logits` [B,P,h,w] of the pairs, `segment_map` [B,L,H,W], `segments` and `layers` [B,P] the index and map layer of
    each pair's segment, `counts` [B] the real pairs of each image (the rest of its row is padding and gives zeros).
    """
    settings = Settings(focal_weight, dice_weight, alpha, gamma, exclude)
    arguments = (logits, segment_map, segments, layers, counts)
    focal, dice, gradient = run(kernels, *arguments, settings, want_gradient=want_gradient)
    total = torch.add(focal_weight * focal, dice, alpha=dice_weight).sum()
    return total, focal, dice, focal.new_empty(0) if gradient is None else gradient


@mask_loss.register_fake
def _shapes(logits: Tensor, segment_map: Tensor, segments: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, want_gradient = torch.promote_types(logits.dtype, torch.float32), rest[-1]
    of_pairs = [segments.shape, segments.shape, logits.shape if want_gradient else (0,)]
    focal, dice, gradient = (logits.new_empty(shape, dtype=dtype) for shape in of_pairs)
    return logits.new_empty((), dtype=dtype), focal, dice, gradient


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)


def _scaled_gradient(ctx: Any, of_total: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * of_total).to(ctx.dtype), *(None for _ in range(ctx.inputs - 1))


mask_loss.register_autograd(_scaled_gradient, setup_context=_keep_gradient)
