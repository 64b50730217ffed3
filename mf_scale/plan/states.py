"""Bytes that a rank holds all through training, by ZeRO stage: whole numbers, as DeepSpeed lays its tensors out. Pure.

Everything is fp32 in every precision (bf16 and fp16 are autocast). Where it was found by running DeepSpeed and differs
from what the papers say, the line says so; `test_plan_states.py` holds the numbers to the engine's own tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

FP32 = 4
_ALIGNMENT = 2
"""Stages 1 and 2: elements that each rank's share of a group is rounded up to."""
_PERSISTENT = 100_000
"""Stage 3: parameters of up to so many elements stay whole on every rank (DeepSpeed's default)."""
_MOST_LIVE = 1_000_000_000
"""Stage 3: elements of gathered parameters that are kept at once (DeepSpeed's default)."""
_FLAT = 500_000_000
"""Stage 0: elements that DeepSpeed copies into one buffer to reduce them."""


@dataclass(frozen=True)
class Tensors:
    """What there is to partition."""

    groups: tuple[tuple[int, ...], ...]
    """Elements of each trained parameter, by parameter group, in the optimizer's order."""
    frozen: tuple[int, ...]
    """Elements of each parameter that is not trained."""
    buffers: int
    """Bytes; whole on every rank at every stage."""
    saved: int = 0
    """Bytes of the model's state_dict."""

    @property
    def trained(self) -> int:
        """Elements."""
        return sum(map(sum, self.groups))


@dataclass(frozen=True)
class Layout:
    """How the tensors are partitioned: the keys of DeepSpeed's configuration that decide on memory."""

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    ranks: int = 1
    accumulation: int = 1
    bucket: int = 0
    """Elements of a bucket."""
    contiguous: bool = True
    overlap: bool = False
    persistent: int = _PERSISTENT
    most_live: int = _MOST_LIVE
    ema: bool = False

    @property
    def name(self) -> str:
        """The stage and what is offloaded."""
        away = [
            what for what, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_parameters)) if on
        ]
        return f"{self.stage}" + (f" + {', '.join(away)} offloaded" if away else "")


@dataclass(frozen=True)
class Held:
    """Bytes of one memory: a GPU's, or a rank's part of its host's."""

    weights: int = 0
    """With buffers."""
    gradients: int = 0
    """At their most, in a step's last backward pass."""
    master: int = 0
    """The copy of the rank's share that the optimizer works on."""
    moments: int = 0
    buckets: int = 0
    """What gradients are reduced in, and with offload the copies on their way."""
    gathered: int = 0
    """Stage 3: whole weights beside the shares, at the end of the forward pass."""
    average: int = 0
    """ema.decay."""

    @property
    def total(self) -> int:
        """Of everything."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class States:
    """What one rank holds; of ranks that differ, the one with the most."""

    layout: Layout
    gpu: Held
    host: Held
    """Only what offloading puts there."""
    update: int
    """Bytes on the GPU beyond these that come after the backward pass, when no activations are left."""


def count_states(tensors: Tensors, layout: Layout) -> States:
    """The states of a rank under `layout`."""
    if layout.stage == 0:
        return _replicated(tensors, layout)
    return _sharded(tensors, layout) if layout.stage == 3 else _flat(tensors, layout)


def _replicated(tensors: Tensors, layout: Layout) -> States:
    trained = tensors.trained * FP32
    weights = trained + sum(tensors.frozen) * FP32 + tensors.buffers
    gpu = Held(weights, trained, moments=2 * trained, average=trained * layout.ema)
    return States(layout, gpu, Held(), min(trained, _FLAT * FP32) if layout.ranks > 1 else 0)


def _flat(tensors: Tensors, layout: Layout) -> States:
    """Stages 1 and 2: each group's parameters lie in one flat tensor, cut into equal shares."""
    padded = [flat_share(sum(group), layout.ranks) * layout.ranks for group in tensors.groups]
    shares = [size // layout.ranks * FP32 for size in padded]
    share, trained, own = sum(shares), tensors.trained * FP32, _largest_part(tensors.groups, layout.ranks) * FP32
    largest = max(map(max, tensors.groups)) * FP32
    weights = sum(padded) * FP32 + sum(tensors.frozen) * FP32 + tensors.buffers
    average = trained * layout.ema
    bucket = layout.bucket * FP32
    if layout.contiguous or layout.offload_optimizer:
        # A gradient that no bucket can hold stays where it is until it is reduced.
        buckets = bucket * (1 + layout.overlap) + (largest if largest > bucket else 0)
    else:
        buckets = min(max(bucket, largest), trained)  # torch's own gradients, flattened to be reduced
    # Stage 1: whole until the last micro-batch is through. Stage 2: the parts of parameters that two shares meet in are
    # kept whole, and from the second micro-batch on the sum so far stands beside the new ones.
    gradients = trained if layout.stage == 1 else own * (2 if layout.accumulation > 1 else 1)
    if not layout.offload_optimizer:
        after = own if layout.stage == 1 and layout.contiguous else max(shares)
        gpu = Held(weights, gradients, share, 2 * share, buckets, average=average)
        return States(layout, gpu, Held(), after)
    gpu = Held(weights, gradients if layout.stage == 1 else 0, buckets=buckets + largest, average=average)
    summed = own if layout.stage == 2 and layout.accumulation > 1 else 0
    # Beside the masters there is a second copy of the share, on its way back to the GPU, and room for one parameter.
    host = Held(gradients=share + summed, master=share, moments=2 * share, buckets=share + largest)
    return States(layout, gpu, host, 0)


def _sharded(tensors: Tensors, layout: Layout) -> States:
    """Stage 3: every parameter is cut into equal shares, those that are not trained too."""
    ranks = layout.ranks
    every = [size for group in (*tensors.groups, tensors.frozen) for size in group]
    share = sum(-(-size // ranks) for group in tensors.groups for size in group) * FP32
    fixed = sum(-(-size // ranks) for size in tensors.frozen) * FP32
    gathered = 0
    if ranks > 1:
        kept = sum(_round_up(size, ranks) for size in every if size <= layout.persistent)
        whole = sum(_round_up(size, ranks) for size in every)
        gathered = max(kept, min(whole, layout.most_live)) * FP32
    bucket = layout.bucket * FP32
    average = share * layout.ema
    away = share * layout.offload_parameters
    weights = share + fixed + tensors.buffers - away
    if layout.offload_optimizer:
        gpu = Held(weights, buckets=bucket, gathered=gathered, average=average)
        # The gradients of a step, and their sum that the optimizer reads.
        return States(layout, gpu, Held(away, 2 * share, share, 2 * share), 0)
    # DeepSpeed keeps masters of their own at stage 3 too, though weights are fp32 already.
    gpu = Held(weights, share, share, 2 * share, bucket, gathered, average)
    return States(layout, gpu, Held(weights=away), 0)


def flat_share(elements: int, ranks: int) -> int:
    """Stages 1 and 2: elements of a group that each rank has, the last one's padded."""
    return _round_up(elements, _ALIGNMENT * ranks) // ranks


def _largest_part(groups: Sequence[Sequence[int]], ranks: int) -> int:
    """Elements of the parameters that touch a rank's share, those at its borders whole; of the rank with the most."""
    parts = [0] * ranks
    for group in groups:
        share = flat_share(sum(group), ranks)
        for end, size in zip(accumulate(group), group, strict=True):
            for rank in range((end - size) // share, (end - 1) // share + 1):
                parts[rank] += size
    return max(parts)


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
