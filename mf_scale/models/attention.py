"""The one attention function of the program, and the choice of its kernel by running it once."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import logging
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.errors import UserError

KERNELS = ("xformers", "sdpa", "reference")
_OLD_RUNTIME = "nvidia-cuda-runtime-cu12"
"""The wheel that carries libcudart.so.12."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    kernel: str = "auto",
    dropout: float = 0.0,
    *,
    open_rows: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v: q [B,M,H,K], k and v [B,N,H,K] -> [B,M,H,K] in q's dtype.

    `bias` (added, may hold -inf) and `mask` (boolean, True where a query may look) broadcast to [B,H,M,N]; what they
    share along an axis is never copied out. A query that may look nowhere gets zeros, with zero gradients, whatever the
    kernel; `open_rows` promises that there is none and saves looking for it. `dropout` acts on the softmax.
    `kernel` is auto, xformers, sdpa or reference; UserError for one that cannot run on q's device and dtype.
    """
    chosen = _settled(kernel, q.device.type, q.dtype)
    merged = _merged(q.dtype, k.shape[1], bias, mask)
    blind = None
    if merged is not None and not open_rows:
        # A row of -inf alone is NaN in some kernels and poisons gradients in others: it is opened, its result dropped.
        blind = torch.isneginf(merged).all(dim=-1, keepdim=True)
        merged = merged.masked_fill(blind, 0.0)
    out = _RUN[chosen](q, k, v, merged, dropout)
    return out if blind is None else out.masked_fill(blind.transpose(1, 2), 0.0)


@torch.compiler.assume_constant_result  # the probe runs operators, which torch.compile cannot trace
def _settled(requested: str, device_type: str, dtype: torch.dtype) -> str:
    return resolve_kernel(requested, device_type, dtype)


@functools.cache
def resolve_kernel(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The kernel that `requested` means on this device and dtype; each one was run before it is named.

    Raises UserError for an unknown kernel and for one that cannot run here.
    """
    if requested not in ("auto", *KERNELS):
        raise UserError(f"unknown attention kernel {requested!r}", remedy=f"Use auto or one of {', '.join(KERNELS)}.")
    if device_type == "meta":
        return "sdpa"  # shapes without numbers: there is nothing to choose by
    if requested == "auto":
        # xformers has operators for CUDA devices only; not importing it elsewhere saves seconds at every start. The
        # backward of its kernel with a bias adds in no fixed order, which a deterministic run must not.
        usable = device_type == "cuda" and not torch.are_deterministic_algorithms_enabled()
        usable = usable and _why_not("xformers", device_type, dtype) is None
        return "xformers" if usable else "sdpa"
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
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
            for bias in (None, torch.zeros(1, 1, 3, 5, device=device_type, dtype=dtype, requires_grad=True)):
                q = torch.zeros(2, 3, 2, 16, device=device_type, dtype=dtype, requires_grad=True)
                k = torch.zeros(2, 5, 2, 16, device=device_type, dtype=dtype, requires_grad=True)
                _RUN[kernel](q, k, k, bias, 0.0).sum().backward()
    except Exception as error:  # a library may fail in any way it likes; the reason is reported
        return f"{type(error).__name__} {' '.join(str(error).split())[:400]}"
    return None


def _merged(dtype: torch.dtype, length: int, bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Bias and mask as one additive tensor [b,h,m,N] whose first three axes are whole or 1, as they came."""
    if bias is None and mask is None:
        return None
    if mask is None:
        merged = bias.to(dtype)  # type: ignore[union-attr]
    else:
        merged = torch.where(
            mask, torch.zeros((), dtype=dtype, device=mask.device) if bias is None else bias, -torch.inf
        )
        merged = merged.to(dtype)
    merged = merged[(None,) * (4 - merged.ndim)]
    return merged.expand(*merged.shape[:3], length)


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
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).transpose(1, 2)
    # An exported program runs elsewhere, where another kernel may lay its result out in another order.
    return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    width = q.shape[-1]
    if width % 8:  # its kernels read rows of eight; zeros add nothing to a product
        q, k, v = (F.pad(t, (0, 8 - width % 8)) for t in (q, k, v))
    if bias is not None:
        # It wants the whole shape [B,H,M,N]; strides of zero do.
        bias = _aligned(bias).expand(q.shape[0], q.shape[2], -1 if bias.shape[2] > 1 else q.shape[1], -1)
    out = _xformers_ops().memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=width**-0.5)
    return out[..., :width]


def _aligned(bias: Tensor) -> Tensor:
    """The same bias in memory of its own whose rows start at multiples of eight elements, as xformers wants it."""
    length = bias.shape[-1]
    # With four axes the padding keeps an order of channels last, which Swin's biases come in; with three there is none.
    return F.pad(bias.flatten(0, 1), (0, 8 - length % 8)).unflatten(0, bias.shape[:2])[..., :length]


@functools.cache
def _xformers_ops() -> Any:
    level = logging.getLogger("xformers").level
    logging.getLogger("xformers").setLevel(logging.ERROR)
    _load_old_runtime()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import xformers.ops

            return xformers.ops
    finally:
        logging.getLogger("xformers").setLevel(level)


def _load_old_runtime() -> None:
    """Load libcudart.so.12 where torch itself brings another: xformers' library is linked to it.

    Without it the library does not load and xformers refuses every call. Where the wheel is missing nothing is done;
    the probe will tell.
    """
    if torch.version.cuda is None or torch.version.cuda.startswith("12."):
        return
    try:
        files = importlib.metadata.files(_OLD_RUNTIME) or []
        found = [str(file.locate()) for file in files if file.name == "libcudart.so.12"]
        for library in found:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except (importlib.metadata.PackageNotFoundError, OSError):
        return


_RUN = {"xformers": _xformers, "sdpa": _sdpa, "reference": _reference}
