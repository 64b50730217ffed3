"""What a configuration costs, before anything is started: parameters and FLOPs by part, batches, memory of the weights.

The model is built on torch's meta device: no weights are loaded or allocated. FLOPs are 2 x multiply-accumulate of the
forward pass of one image of data.crop, counted by torch.utils.flop_counter (convolutions and matrix products).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mf_scale.config.consent import belongs_to_a_checkpoint, refuse_unasked_code
from mf_scale.config.load import load_config
from mf_scale.config.schema import Config, ModelConfig
from mf_scale.config.validate import BatchPlan, plan_batch, validate
from mf_scale.errors import UserError

PRODUCT = "mask product"
"""The part that is no module: the last layer's embeddings times the pixel embeddings."""
_FP32, _GIB = 4, 2**30


@dataclass(frozen=True)
class Part:
    """One part of the model."""

    name: str
    parameters: int
    """With the weights that a frozen batch norm keeps as buffers."""
    trainable: int
    flops: int
    """Forward, one image."""


@dataclass(frozen=True)
class Memory:
    """Bytes a rank holds all through training, computed from the parameter counts; activations are not in it."""

    parameters: int
    gradients: int
    master: int
    """The flat copy of this rank's share that ZeRO's optimizer works on."""
    adam: int
    bucket: int
    """The buffer that ZeRO reduces gradients in."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.master + self.adam + self.bucket


@dataclass(frozen=True)
class Plan:
    """One configuration, planned for `ranks` ranks."""

    file: str
    config: Config
    parts: tuple[Part, ...]
    ranks: int
    batches: tuple[BatchPlan, ...]
    """One for every number of ranks up to `ranks` that the global batch can be cut for."""
    refusal: str | None
    """Why it cannot be cut for `ranks` itself."""
    memory: Memory

    @property
    def total(self) -> Part:
        """The whole model."""
        return _sum(self.parts)


def plan_config(file: str, overrides: Sequence[str], ranks: int) -> Plan:
    """Plan the configuration of `file` with the dot-list `overrides`; raises UserError."""
    config = load_config(file, overrides)
    validate(config)
    if belongs_to_a_checkpoint(Path(file)):
        refuse_unasked_code(config, overrides, Path(file))
    parts = count_parts(config, where=file)
    batches, refusal = _batches(config, ranks)
    return Plan(file, config, parts, ranks, batches, refusal, memory_of_a_rank(_sum(parts), config, ranks))


def count_parts(config: Config, *, where: str = "configuration") -> tuple[Part, ...]:
    """Parameters and FLOPs of the model's parts, in their order, and of the mask product.

    UserError without model.num_classes, and for a model that cannot be built or run without memory.
    """
    if config.model.num_classes is None:
        raise UserError(
            "model.num_classes is not set, and plan reads no data",
            where=where,
            remedy="Give it, for example model.num_classes=133.",
        )
    try:
        return _count(config.model, config.model.num_classes, config.data.crop)
    except UserError:
        raise
    except Exception as error:  # timm's models and users' builders may refuse in any way; the reason is passed on
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the model cannot be counted on torch's meta device: {type(error).__name__} {first}", where=where
        ) from error


def _count(config: ModelConfig, num_classes: int, crop: Sequence[int]) -> tuple[Part, ...]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mf_scale.models.build import build_model
    from mf_scale.models.outputs import PixelPrediction

    # On the meta device attention is torch's SDPA, counted as the two products it is, whatever kernel trains.
    bare = replace(config, backbone=replace(config.backbone, weights="none"))
    with torch.device("meta"), torch.no_grad():
        model = build_model(bare, num_classes, seed=0).eval()
        image = torch.empty(1, 3, *crop)
        with FlopCounterMode(display=False) as forward:
            prediction = model(image)
        with FlopCounterMode(display=False) as product:
            if isinstance(prediction, PixelPrediction):
                prediction.logits()
            else:
                torch.einsum("bqc,bchw->bqhw", prediction.mask_embeddings, prediction.pixel_embeddings)
    counts = forward.get_flop_counts()
    parts = [
        _part(name, child, sum(counts.get(f"{type(model).__name__}.{name}", {}).values()))
        for name, child in model.named_children()
    ]
    outside = forward.get_total_flops() - sum(part.flops for part in parts)
    own = sum(p.numel() for p in model.parameters(recurse=False))
    listed = [part for part in (*parts, Part("other", own, own, outside)) if part.parameters or part.flops]
    return (*listed, Part(PRODUCT, 0, 0, product.get_total_flops()))


def _part(name: str, module: Any, flops: int) -> Part:
    """`module` is an nn.Module; torch is not imported for its name."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    frozen = sum(b.numel() for n, b in module.named_buffers() if n.rpartition(".")[2] in ("weight", "bias"))
    return Part(name.replace("_", " "), trainable + fixed + frozen, trainable, flops)


def _sum(parts: Sequence[Part]) -> Part:
    return Part("sum", sum(p.parameters for p in parts), sum(p.trainable for p in parts), sum(p.flops for p in parts))


def memory_of_a_rank(model: Part, config: Config, ranks: int) -> Memory:
    """What weights, gradients and Adam's moments take on each rank: all fp32, as DeepSpeed's ZeRO lays them out.

    Parameters are whole on every rank. Stage 1 cuts the moments over the ranks, stage 2 the gradients too; both work on
    a flat copy of the rank's share and reduce gradients in a buffer of zero.bucket_mib.
    """
    stage, whole = config.zero.stage, model.trainable * _FP32
    share = -(-model.trainable // ranks) * _FP32
    return Memory(
        parameters=model.parameters * _FP32,
        gradients=share if stage == 2 else whole,
        master=share if stage else 0,
        adam=2 * (share if stage else whole),
        bucket=config.zero.bucket_mib * 2**20 if stage else 0,
    )


def _batches(config: Config, ranks: int) -> tuple[tuple[BatchPlan, ...], str | None]:
    plans, refusal = [], None
    for count in range(1, ranks + 1):
        try:
            plans.append(plan_batch(config, count))
        except UserError as error:
            refusal = str(error) if count == ranks else None
    return tuple(plans), refusal


def page(plan: Plan) -> str:
    """One configuration in full: a table of parts, the batches, the memory."""
    config, total = plan.config, plan.total
    model, (height, width) = config.model, config.data.crop
    source = model.pixel_level.builder or model.backbone.name
    lines = [
        f"{plan.file}: {model.kind}, {source}, {model.num_classes} classes, image {height}x{width}",
        "",
        f"{'part':<20}{'parameters':>13}{'trainable':>13}{'GFLOP':>10}{'share':>8}",
    ]
    for part in (*plan.parts, total):
        share = f"{part.flops / total.flops:.1%}" if total.flops else ""
        lines.append(f"{part.name:<20}{part.parameters:>13,}{part.trainable:>13,}{part.flops / 1e9:>10.2f}{share:>8}")
    lines += ["FLOPs: 2 x multiply-accumulate, forward, one image, masks of the last layer", ""]
    lines.append(f"{'ranks':>5}{'global batch':>14}{'micro-batch':>13}{'accumulation':>14}")
    lines += [f"{b.world_size:>5}{b.global_batch:>14}{b.micro_batch:>13}{b.accumulation:>14}" for b in plan.batches]
    if plan.refusal:
        lines.append(f"{plan.ranks:>5} {plan.refusal}")
    images = config.train.steps * config.train.global_batch
    lines += ["", f"steps {config.train.steps:,}, images seen {images:,}", _memory_line(plan)]
    if model.backbone.recompute_stages:
        stages = ", ".join(map(str, model.backbone.recompute_stages))
        lines.append(f"stages recomputed in the backward pass: {stages} (their forward runs twice in training)")
    if model.compile:
        lines.append("torch.compile: on")
    return "\n".join(lines)


def _memory_line(plan: Plan) -> str:
    shares = [(name, size) for name, size in asdict(plan.memory).items() if size]
    listed = " + ".join(f"{name} {size / _GIB:.2f}" for name, size in shares)
    return (
        f"memory of each of {plan.ranks} ranks at ZeRO stage {plan.config.zero.stage}, computed, without activations:\n"
        f"  {listed} = {plan.memory.total / _GIB:.2f} GiB"
    )


def table(plans: Sequence[Plan]) -> str:
    """Several configurations, one line each."""
    wide = max(len(plan.file) for plan in plans) + 2
    ranks = plans[0].ranks
    head = f"{'configuration':<{wide}}{'image':>10}{'classes':>8}{'param M':>9}{'train M':>9}{'GFLOP':>9}"
    lines = [f"{head}{'batch':>7}{'micro x acc.':>14}{'steps':>9}{'images':>13}{'GiB':>7}"]
    for plan in plans:
        config, total = plan.config, plan.total
        cut = plan.batches[-1] if plan.refusal is None else None
        batch = f"{cut.micro_batch} x {cut.accumulation}" if cut else "not cut"
        height, width = config.data.crop
        lines.append(
            f"{plan.file:<{wide}}{f'{height}x{width}':>10}{config.model.num_classes:>8}"
            f"{total.parameters / 1e6:>9.1f}{total.trainable / 1e6:>9.1f}{total.flops / 1e9:>9.1f}"
            f"{config.train.global_batch:>7}{batch:>14}{config.train.steps:>9,}"
            f"{config.train.steps * config.train.global_batch:>13,}{plan.memory.total / _GIB:>7.2f}"
        )
    lines += [
        f"GFLOP: 2 x multiply-accumulate, forward, one image. Batch and GiB: for {ranks} ranks; GiB: weights,",
        "gradients and Adam's moments of each rank (computed, without activations).",
    ]
    return "\n".join(lines)


def as_json(plans: Sequence[Plan]) -> str:
    """All numbers of the plans, a list in their order."""
    return json.dumps([_as_dict(plan) for plan in plans], indent=1)


def _as_dict(plan: Plan) -> dict[str, Any]:
    config = plan.config
    return {
        "config": plan.file,
        "kind": config.model.kind,
        "backbone": config.model.pixel_level.builder or config.model.backbone.name,
        "num_classes": config.model.num_classes,
        "image": list(config.data.crop),
        "parts": [asdict(part) for part in plan.parts],
        "parameters": plan.total.parameters,
        "trainable": plan.total.trainable,
        "flops": plan.total.flops,
        "ranks": plan.ranks,
        "batches": [asdict(batch) for batch in plan.batches],
        "refusal": plan.refusal,
        "steps": config.train.steps,
        "images": config.train.steps * config.train.global_batch,
        "zero_stage": config.zero.stage,
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "recompute_stages": list(config.model.backbone.recompute_stages),
        "compile": config.model.compile,
    }
