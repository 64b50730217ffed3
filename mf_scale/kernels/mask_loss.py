"""The mask loss as one operator of torch: focal, dice and their gradient in one pass, whatever kernel computes it.

A custom op, so that torch.compile keeps it in its graph as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    return tensor.to(wide_dtype(tensor))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or the tensor's own where it is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.library.custom_op("mf_scale::product", mutates_args=())
def product(left: Tensor, right: Tensor) -> Tensor:
    """[B,m,k] by [B,k,n] added up in fp32 (fp64 for fp64), whatever autocast says; not differentiable.

    An operator of its own, so that these rules also hold where the backward is compiled.
    """
    with torch.autocast(left.device.type, enabled=False), tf32(left.is_cuda):
        return torch.bmm(wide(left), wide(right))


@product.register_fake
def _shape_of_product(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty((*left.shape[:2], right.shape[2]), dtype=wide_dtype(left))


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """TF32 holds bf16 embeddings exactly and is many times faster than fp32; the sums stay fp32. Never on a CPU.

    The setting is the process's, so it is put back at once.
    """
    if not on:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@torch.library.custom_op("mf_scale::mask_loss", mutates_args=())
def mask_loss(
    mask_embeddings: Tensor,
    pixel_embeddings: Tensor,
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
    """(total, focal [B,P], dice [B,P], gradient by the logits [B,P,h,w] or an empty tensor).

    total alone is differentiable: by the embeddings, once, and with `want_gradient`. Else backward raises RuntimeError.
    The logits are the `product` of the pairs' `mask_embeddings` [B,P,C] and `pixel_embeddings` [B,C,h,w] and not kept.
    `segment_map` [B,L,H,W]; `segments` and `layers` [B,P] the index and map layer of each pair's segment; `counts` [B]
    the real pairs of each image (the rest of its row is padding and gives zeros).
    """
    settings = Settings(focal_weight, dice_weight, alpha, gamma, exclude)
    with torch.autocast(mask_embeddings.device.type, enabled=False):
        logits = product(mask_embeddings, pixel_embeddings.flatten(2)).unflatten(2, pixel_embeddings.shape[2:])
        pairs = (logits, segment_map, segments, layers, counts)
        focal, dice, gradient = run(kernels, *pairs, settings, want_gradient=want_gradient)
    total = torch.add(focal_weight * focal, dice, alpha=dice_weight).sum()
    return total, focal, dice, focal.new_empty(0) if gradient is None else gradient


@mask_loss.register_fake
def _shapes(
    mask_embeddings: Tensor, pixel_embeddings: Tensor, segment_map: Tensor, segments: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, want_gradient = wide_dtype(mask_embeddings), rest[-1]
    logits = (*segments.shape, *pixel_embeddings.shape[2:])
    of_pairs = [segments.shape, segments.shape, logits if want_gradient else (0,)]
    focal, dice, gradient = (mask_embeddings.new_empty(shape, dtype=dtype) for shape in of_pairs)
    return mask_embeddings.new_empty((), dtype=dtype), focal, dice, gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros as large as these outputs are made for the backward
    ctx.inputs, ctx.want_gradient = len(inputs), inputs[-1]


def _through_the_product(ctx: Any, of_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The scale goes to the small factor, so no second gradient of the logits' size is made."""
    if of_total is None:
        return (None,) * ctx.inputs
    if not ctx.want_gradient:
        raise RuntimeError("mf_scale::mask_loss was called without want_gradient and has no gradient")
    if torch.is_grad_enabled():
        # The kept gradient is a constant to torch: second derivatives would come out wrong, and nobody would be told.
        raise RuntimeError("mf_scale::mask_loss has no second derivative: do not use create_graph=True")
    mask_embeddings, pixel_embeddings, gradient = ctx.saved_tensors
    flat, pixels = gradient.flatten(2), pixel_embeddings.flatten(2)
    to_masks = to_pixels = None
    if ctx.needs_input_grad[0]:
        to_masks = (product(flat, pixels.transpose(1, 2)) * of_total).to(mask_embeddings.dtype)
    if ctx.needs_input_grad[1]:
        to_pixels = product((wide(mask_embeddings) * of_total).transpose(1, 2), flat)
        to_pixels = to_pixels.view(pixel_embeddings.shape).to(pixel_embeddings.dtype)
    return to_masks, to_pixels, *(None for _ in range(ctx.inputs - 2))


mask_loss.register_autograd(_through_the_product, setup_context=_keep)
