"""The one attention function of the program, and the choice of its kernel by running it once."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.errors import UserError

KERNELS = ("xformers", "sdpa", "reference")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    kernel: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v: q [B,M,H,K], k and v [B,N,H,K] -> [B,M,H,K] in q's dtype.

    `bias` (added, may hold -inf) and `mask` (boolean, True where a query may look) broadcast to [B,H,M,N]. A query
    that may look nowhere gets zeros, with zero gradients, whatever the kernel. `dropout` acts on the softmax.
    `kernel` is auto, xformers, sdpa or reference; UserError for one that cannot run on q's device and dtype.
    """
    chosen = resolve_kernel(kernel, q.device.type, q.dtype)
    bias, blind = _merge_mask(q, k, bias, mask)
    out = _RUN[chosen](q, k, v, bias, dropout)
    return out if blind is None else out.masked_fill(blind, 0.0)


@functools.cache
def resolve_kernel(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The kernel that `requested` means on this device and dtype; each one was run before it is named.

    Raises UserError for an unknown kernel and for one that cannot run here.
    """
    if requested == "auto":
        # xformers has operators for CUDA devices only; not importing it elsewhere saves seconds at every start.
        usable = device_type == "cuda" and _why_not("xformers", device_type, dtype) is None
        return "xformers" if usable else "sdpa"
    if requested not in KERNELS:
        raise UserError(f"unknown attention kernel {requested!r}", remedy=f"Use auto or one of {', '.join(KERNELS)}.")
    reason = _why_not(requested, device_type, dtype)
    if reason is not None:
        raise UserError(
            f"the attention kernel {requested} cannot run here on {device_type} in {dtype}: {reason}",
            where="model.attention",
            remedy="Use auto, which takes the first kernel that runs.",
        )
    return requested


def _why_not(kernel: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None when one small forward and backward, with bias and without, run; else the reason in one line."""
    try:
        with torch.enable_grad(), torch.autocast(device_type, enabled=False):
            for bias in (None, torch.zeros(1, 2, 3, 5, device=device_type, dtype=dtype)):
                q = torch.zeros(1, 3, 2, 16, device=device_type, dtype=dtype, requires_grad=True)
                k = torch.zeros(1, 5, 2, 16, device=device_type, dtype=dtype, requires_grad=True)
                _RUN[kernel](q, k, k, bias, 0.0).sum().backward()
    except Exception as error:  # a library may fail in any way it likes; the reason is reported
        return f"{type(error).__name__} {' '.join(str(error).split())[:400]}"
    return None


def _merge_mask(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """One additive bias [B,H,M,N] for all kernels, and the queries [B,M,H,1] that may look nowhere.

    Those get an open row for the softmax: a row of -inf alone is NaN in some kernels and poisons gradients in others.
    """
    if bias is None and mask is None:
        return None, None
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    merged = q.new_zeros(shape) if bias is None else bias.to(q.dtype).expand(shape)
    if mask is not None:
        merged = merged.masked_fill(~mask, -torch.inf)
    blind = torch.isneginf(merged).all(dim=-1, keepdim=True)
    return merged.masked_fill(blind, 0.0), blind.transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bmhk,bnhk->bhmn", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        weights = F.dropout(scores.softmax(dim=-1), dropout)
        return torch.einsum("bhmn,bnhk->bmhk", weights, v.to(wide)).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    width = q.shape[-1]
    if width % 8:  # its kernels read rows of eight; zeros add nothing to a product
        q, k, v = (F.pad(t, (0, 8 - width % 8)) for t in (q, k, v))
    if bias is not None:
        bias = _aligned(bias)
    out = _xformers_ops().memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=width**-0.5)
    return out[..., :width]


def _aligned(bias: Tensor) -> Tensor:
    """The same bias [B,H,M,N] in memory whose rows start at multiples of eight elements, as xformers wants it."""
    length = bias.shape[-1]
    return F.pad(bias, (0, -length % 8))[..., :length]


@functools.cache
def _xformers_ops() -> Any:
    level = logging.getLogger("xformers").level
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import xformers.ops

            return xformers.ops
    finally:
        logging.getLogger("xformers").setLevel(level)


_RUN = {"xformers": _xformers, "sdpa": _sdpa, "reference": _reference}
