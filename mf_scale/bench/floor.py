"""What a GPU needs at the least for the losses: counts of the work over rates that are measured on the same device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

PER_PIXEL = 2 * 3
"""Transcendentals of a pair's pixel in the mask loss: exp2, log2 and a reciprocal, in each of the two passes."""
PER_LOGIT = 3
"""Transcendentals of a query's logit in the matching cost."""
_COPIED = 2**30
_CHAIN = 256
_ELEMENTS = 2**24


class Work(NamedTuple):
    """What has to be done, whoever does it."""

    bytes: int
    """Moved between the device's memory and its cores."""
    transcendentals: int
    """exp2, log2 and reciprocals."""


class Ceilings(NamedTuple):
    """Rates of a device."""

    bytes_per_s: float
    transcendentals_per_s: float


def work(images: int, queries: int, segments: int, cells: int, size: int, layers: int, channels: int) -> Work:
    """Of matching cost and mask loss, forward and backward, from fp32 embeddings and an int16 map.

    A pair's logit is written by the product, read in both passes; its gradient is written, and read by both products of
    the backward. The embeddings are read by cost and loss and again by the backward, and their gradient is written.
    """
    pairs = images * layers * min(queries, segments)
    logits, pixels = images * layers * queries * cells**2, pairs * size**2
    of_pairs = 6 * 4 * pairs * cells**2
    embeddings = 4 * 4 * images * channels * (cells**2 + layers * queries)
    maps = 2 * images * (2 * size**2 + cells**2)
    return Work(of_pairs + embeddings + maps, PER_PIXEL * pixels + PER_LOGIT * logits)


def floor_ms(todo: Work, ceilings: Ceilings) -> float:
    """Milliseconds that no implementation with these counts can beat: the longer of moving and computing."""
    return 1e3 * max(todo.bytes / ceilings.bytes_per_s, todo.transcendentals / ceilings.transcendentals_per_s)


def achieved(floor: float, measured_ms: float) -> float:
    """Share of the floor's rate that was reached, 1 at the floor."""
    return floor / measured_ms if measured_ms > 0 else float("nan")


def measure_ceilings(device: torch.device) -> Ceilings:
    """Bytes by copying 1 GiB (each byte is read and written), transcendentals by a chain of exp2 in registers.

    The chain is one kernel that CUDA's own compiler makes (torch.cuda.jiterator): 256 dependent exp2 an element, 16 M
    elements, so that nothing but the special function units matters. The best of five.
    """
    source, target = (torch.empty(_COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    copying = _best_seconds(lambda: target.copy_(source))
    elements = torch.rand(_ELEMENTS, device=device)
    chain = torch.cuda.jiterator._create_jit_fn(chain_source(_CHAIN))
    computing = _best_seconds(lambda: chain(elements))
    return Ceilings(2 * _COPIED / copying, _CHAIN * _ELEMENTS / computing)


def chain_source(length: int) -> str:
    """C++ of a function of one number x that becomes 2^-x `length` times; it settles at 0.64."""
    return (
        "template <typename T> T chain(T x) {\n"
        "#pragma unroll 16\n"
        f'  for (int i = 0; i < {length}; ++i) asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(-x));\n'
        "  return x;\n"
        "}"
    )


def _best_seconds(launch: Callable[[], object], repeats: int = 5) -> float:
    """Of the launches after one that warms up, by the device's own clock."""
    launch()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return min(times)
