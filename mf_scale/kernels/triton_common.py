"""What the Triton kernels share; the only file that imports Triton, and only they import it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

jit = triton.jit
INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1): on CPU tensors, for tests."""


def block_memory(device: int) -> int:
    """Bytes of shared memory that a block can have on this CUDA device; 0 in the interpreter."""
    if INTERPRETED:
        return 0
    properties: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(device)
    return properties["max_shared_mem"]


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@jit
def _log2(x, GPU: tl.constexpr):
    """tl.log2 is a polynomial of twenty instructions; the approximation is one and right to 2^-22, x being in 1..2."""
    if GPU:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@jit
def sigmoid_terms(u, GPU: tl.constexpr):
    """log2 of s, s and softplus(u) / ln 2, with s = sigmoid, for u in units of ln 2; NaN stays NaN in all three."""
    log = _log2(1.0 + tl.exp2(-tl.abs(u)), GPU)
    lower = tl.minimum(u, 0.0) - log
    return lower, tl.exp2(lower), tl.maximum(u, 0.0) + log


@jit
def to_gamma(lower, s, GAMMA: tl.constexpr):
    """s ** GAMMA, `lower` being log2 of s."""
    if GAMMA == 2.0:
        return s * s
    if GAMMA == 1.0:
        return s
    return tl.exp2(lower * GAMMA)
