"""One real micro-batch on this machine: what it takes, and how many images a second one rank makes of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mf_scale.config.schema import Config
from mf_scale.config.validate import plan_batch
from mf_scale.data.batch import NONE, Batch
from mf_scale.data.collate import cut
from mf_scale.data.index import Index
from mf_scale.data.loader import loss_batches
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.losses.choose import choose_criterion
from mf_scale.losses.terms import StepLoss
from mf_scale.models.build import build_model
from mf_scale.plan.activations import Activations
from mf_scale.training.optimizer import build_optimizer
from mf_scale.training.precision import autocast, set_numerics
from mf_scale.training.transfer import Transfer

_STEPS = 3
"""Steps timed, after one that warms up."""


@dataclass(frozen=True)
class Measured:
    """What one micro-batch took here."""

    device: str
    activations: Activations
    images_per_second: float
    """Of one rank, whole steps under ZeRO: forward, loss, backward and update of a batch that is there already."""


def measure(config: Config, micro_batch: int, *, index: Index | None, segments: int) -> Measured:
    """Run micro-batches of `config` on the first GPU, or on the CPU where there is none.

    With samples of `index`, else made-up ones. Random weights. UserError where the memory does not suffice.
    """
    alone = replace(config, train=replace(config.train, global_batch=micro_batch, micro_batch=micro_batch))
    bare = replace(config.model, backbone=replace(config.model.backbone, weights="none"))
    classes = int(config.model.num_classes or 0)
    world = World()
    try:
        with comm.process_group(world, timeout=600) as device:
            set_numerics(alone, device)
            batch = real_batch(index, alone, micro_batch) if index else made_batch(alone, micro_batch, segments)
            model = build_model(bare, classes, seed=config.seed).to(device).train()
            criterion = choose_criterion(config, classes)
            there = next(Transfer(device).micro_batches(batch, micro_batch))
            activations = one_pass(model, criterion, there, config.train.precision)
            engine = Engine(model, build_optimizer(model, config.optimizer), alone, plan_batch(alone, 1), world)
            try:
                engine.prepare_moments(0)
                rate = _rate(engine, criterion, there)
            finally:
                engine.close()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a micro-batch of {micro_batch} images does not fit into the memory of this machine's GPU",
            where="--measure",
            remedy="Measure a smaller one: train.micro_batch=1.",
        ) from error
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Measured(name, activations, rate)


def one_pass(model: nn.Module, criterion: StepLoss, batch: Batch, precision: str) -> Activations:
    """Bytes that forward, loss and backward of `batch` take beyond weights and gradients, which stand already.

    To the byte: on CUDA by torch's own count, on a CPU by the allocations that torch's profiler records. The first
    pass warms up. Gradients are gone afterwards.
    """
    images = batch.images
    normalisers = criterion.normalisers([*criterion.totals(_on_host(batch))])

    def step() -> None:
        with autocast(images.device, precision):
            prediction = model(images)
        loss = criterion(prediction, batch, normalisers).total
        del prediction
        loss.backward()

    step()
    given = sum(t.nbytes for t in (images, batch.segment_map, batch.labels, batch.segment_layer))
    peak = _peak_on_cuda(step) if images.is_cuda else _peak_on_cpu(step)
    for parameter in model.parameters():
        parameter.grad = None
    return Activations(len(batch.keys), None, peak, 2 * given if images.is_cuda else 0)


def _peak_on_cuda(step: Callable[[], None]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(step: Callable[[], None]) -> int:
    """Highest sum of the allocations and releases of torch's allocator, the kernels' workspaces among them."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _rate(engine: Engine, criterion: StepLoss, batch: Batch) -> float:
    normalisers = criterion.normalisers([*criterion.totals(_on_host(batch))])
    wait = torch.cuda.synchronize if batch.images.is_cuda else lambda: None
    began = 0.0
    for number in range(1 + _STEPS):
        if number == 1:
            wait()
            began = time.perf_counter()
        engine.backward(criterion(engine.forward(batch.images), batch, normalisers).total)
        engine.step(1.0)
    wait()
    return _STEPS * len(batch.keys) / (time.perf_counter() - began)


def real_batch(index: Index, config: Config, images: int) -> Batch:
    """The first images of a source, fitted into data.crop; the same again where it has fewer."""
    found = next(loss_batches(index, config.data, count=images, batch=images, rank=0, world=1))
    return cut(found, 0, images)


def made_batch(config: Config, images: int, segments: int) -> Batch:
    """Random images whose maps are strips, one a segment."""
    generator = torch.Generator().manual_seed(0)
    height, width = config.data.crop
    pictures = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, generator=generator)
    rows = (torch.arange(height) * (segments + 1) // height).to(torch.int16)
    rows[rows == segments] = NONE  # a strip that belongs to none
    strips = rows[None, None, :, None].expand(images, 1, height, width).contiguous()
    labels = torch.randint(0, int(config.model.num_classes or 1), (images, segments), generator=generator)
    return Batch(pictures, strips, labels, torch.zeros_like(labels), [f"made-{i}" for i in range(images)])


def _on_host(batch: Batch) -> Batch:
    tensors = {name: getattr(batch, name).cpu() for name in ("images", "segment_map", "labels", "segment_layer")}
    return replace(batch, **tensors)


def segments_of(batches: Sequence[Batch]) -> int:
    """The most segments of an image."""
    return max(int((batch.labels >= 0).sum(dim=1).max()) for batch in batches)
