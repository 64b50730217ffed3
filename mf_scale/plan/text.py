"""A plan as a page to read. Every figure says whether it was computed, measured or given."""

from __future__ import annotations

import textwrap
from dataclasses import fields

from mf_scale.plan.fit import LEAST_MARGIN, MARGIN, Fit, Need
from mf_scale.plan.planning import Plan
from mf_scale.plan.scale_text import scale_lines
from mf_scale.plan.sizes import GIB, shown
from mf_scale.plan.states import Held

_WIDTH = 120
_COLUMNS = [item.name for item in fields(Held)]


def page(plan: Plan, *, formulas: bool = False) -> str:
    """One configuration in full; with `formulas` in symbols too."""
    blocks = [_parts(plan), _batches(plan), _memory(plan), _fit(plan.fit), _run(plan), _data(plan)]
    text = "\n\n".join(block for block in (*blocks, _checkpoints(plan), _notes(plan)) if block)
    scale = scale_lines(plan.scale, plan.ranks, plan.wanted.nodes, plan.config.zero.stage, formulas=formulas)
    return "\n".join([_head(plan), "", *map(_wrapped, text.split("\n")), "", *scale])


def _wrapped(line: str) -> str:
    """Sentences end at `_WIDTH`; rows of tables stay whole."""
    if len(line) <= _WIDTH or "   " in line:
        return line
    return textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _head(plan: Plan) -> str:
    model, (height, width) = plan.config.model, plan.config.data.crop
    source = model.pixel_level.builder or model.backbone.name
    return f"{plan.file}: {model.kind}, {source}, {model.num_classes} classes, image {height}x{width}"


def _parts(plan: Plan) -> str:
    total = plan.total
    lines = [f"{'part':<20}{'parameters':>13}{'trainable':>13}{'GFLOP':>10}{'share':>8}"]
    for part in (*plan.parts, total):
        share = f"{part.flops / total.flops:.1%}" if total.flops else ""
        lines.append(f"{part.name:<20}{part.parameters:>13,}{part.trainable:>13,}{part.flops / 1e9:>10.2f}{share:>8}")
    lines.append("computed; FLOPs: 2 x multiply-accumulate, forward, one image, masks of the last layer")
    return "\n".join(lines)


def _batches(plan: Plan) -> str:
    lines = [f"{'ranks':>5}{'global batch':>14}{'micro-batch':>13}{'accumulation':>14}"]
    lines += [f"{b.world_size:>5}{b.global_batch:>14}{b.micro_batch:>13}{b.accumulation:>14}" for b in plan.batches]
    if plan.refusal:
        lines.append(f"{plan.ranks:>5} {plan.refusal}")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    if plan.cut is None:
        return ""
    lines = [f"memory of each of {plan.ranks} GPUs in GiB, micro-batch {plan.cut.micro_batch}, computed:"]
    if plan.needs:
        lines += _stages(plan)
        activations = plan.needs[0].activations
        kept = f", {shown(activations.kept)} of them kept from the forward pass" if activations.kept else ""
        lines.append(
            f"activations of one micro-batch: {shown(activations.peak)} at their most{kept}; {_told(plan)}; and "
            f"{shown(activations.inputs)} for the images of this and the next one"
        )
    else:
        held = plan.states.gpu
        listed = " + ".join(f"{name} {getattr(held, name) / GIB:.2f}" for name in _COLUMNS if getattr(held, name))
        lines.append(f"  at ZeRO stage {plan.states.layout.name}, without activations: {listed} = {shown(held.total)}")
    if plan.measured is not None:
        lines.append(f"measured on one {plan.measured_on} here: {shown(plan.measured.peak)} of activations")
    return "\n".join(lines)


def _told(plan: Plan) -> str:
    config = plan.config
    source = "the most in the index" if plan.dataset.indexes else "assumed"
    stages = config.model.backbone.recompute_stages
    recomputed = f", stages {', '.join(map(str, stages))} recomputed" if stages else ""
    return (
        f"{config.train.precision}, attention {config.model.attention}, on {plan.wanted.device}{recomputed}, "
        f"{plan.segments} segments an image ({source})"
    )


def _stages(plan: Plan) -> list[str]:
    used = [n for n in _COLUMNS if any(getattr(need.states.gpu, n) for need in plan.needs)]
    host = any(need.states.host.total for need in plan.needs)
    wide = max(len(need.states.layout.name) for need in plan.needs) + 4
    head = f"  {'ZeRO stage':<{max(wide, 12)}}" + "".join(f"{name:>11}" for name in used)
    head += f"{'activations':>13}{'at most':>9}" + (f"{'host':>8}" if host else "")
    lines = [head + (f"{'micro-batch':>13}" if plan.fit else "")]
    for need in plan.needs:
        mark = "*" if need.states.layout == plan.states.layout else " "
        row = f" {mark}{need.states.layout.name:<{max(wide, 12)}}"
        row += "".join(f"{getattr(need.states.gpu, name) / GIB:>11.2f}" for name in used)
        row += f"{need.activations.total / GIB:>13.2f}{need.total / GIB:>9.2f}"
        row += f"{need.states.host.total / GIB:>8.2f}" if host else ""
        lines.append(row + (f"{_largest(need):>13}" if plan.fit else ""))
    lines.append("  * the configuration's" + ("; micro-batch: the largest that fits" if plan.fit else ""))
    return lines


def _largest(need: Need) -> str:
    return "none fits" if need.largest is None else f"up to {need.largest}"


def _fit(fit: Fit | None) -> str:
    if fit is None:
        return ""
    least = f"at least {shown(int(LEAST_MARGIN))}"
    memory = f"of {shown(fit.memory)} given, {shown(fit.usable)} are planned with ({MARGIN:.0%} are left free, {least})"
    if fit.choice is None:
        return f"{memory}: nothing fits"
    return (
        f"{memory}:\n  take zero.stage={fit.choice.states.layout.name} with train.micro_batch={fit.micro_batch} "
        f"(accumulation {fit.accumulation}), computed: the smallest stage and its largest micro-batch that fit"
    )


def refusal(plan: Plan) -> str | None:
    """One paragraph where a memory was given and nothing fits into it."""
    if plan.fit is None or plan.fit.choice is not None:
        return None
    helps = "; ".join(plan.fit.advice) or "nothing that was tried makes room"
    least = min(plan.needs, key=lambda need: need.total)
    return (
        f"no ZeRO stage and no micro-batch fits into {shown(plan.fit.usable)} of a GPU (configuration {plan.file}): at "
        f"stage {least.states.layout.name} {shown(least.total)} are needed with a micro-batch of "
        f"{least.activations.micro_batch}. What would help: {helps}."
    )


def _run(plan: Plan) -> str:
    took, config = plan.duration, plan.config
    images = plan.scale.known.get("images")
    if took.epochs is None or images is None:
        epochs = f"epochs unknown ({plan.dataset.note})"
    else:
        source = "given" if images.source == "given" else plan.dataset.note
        epochs = f"{took.epochs:,.1f} epochs of {images.value:,.0f} images ({source})"
    rank = "rank" if plan.measured_on == "CPU" and took.gpu is not None and took.gpu.source != "given" else "GPU"
    lines = [f"steps {took.steps:,}, images seen {took.images:,}, {epochs}: computed"]
    if took.gpu is None or took.hours is None or took.total is None:
        lines.append("time: unknown; give --images-per-second of one GPU, or --measure")
    else:
        lines.append(
            f"time: {_hours(took.hours)} of training alone, computed from {took.gpu.value:,.1f} images/s of one {rank} "
            f"({took.gpu.source}) x {plan.ranks} = {took.total:,.1f} images/s, "
            f"{config.train.global_batch / took.total:.3f} s a step, if every {rank} keeps its rate"
        )
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours / 24:.1f} days ({hours:,.0f} h)" if hours >= 48 else f"{hours:.1f} h"


def _data(plan: Plan) -> str:
    found = plan.cores
    if found.worker is None:
        return "CPU cores of the data path: unknown; give --worker-rate (`mf-scale bench data` tells it), or --measure"
    line = f"data path: one loader process makes {found.worker.value:,.1f} images/s ({found.worker.source})"
    if found.workers is None:
        return f"{line}; cores needed: unknown without images/s of a GPU"
    workers = plan.config.data.workers
    needed = "process is needed" if found.workers == 1 else "processes are needed"
    enough = "enough" if workers >= (found.a_rank or 0) else f"too few: take data.workers={found.a_rank}"
    return (
        f"{line}, so {found.workers:,} loader {needed}, computed: {found.a_rank} a rank, "
        f"{found.a_node} cores a node with one for each rank; data.workers={workers} is {enough}"
    )


def _checkpoints(plan: Plan) -> str:
    c = plan.checkpoints
    parts = [("weights", c.weights), ("moments", c.moments), ("average", c.average)]
    listed = " + ".join(f"{name} {shown(size)}" for name, size in parts if size)
    host = f"; host memory while one is written: {shown(c.first_rank)} of rank 0, {shown(c.other_ranks)} of others"
    return (
        f"checkpoint, computed: {listed} = {shown(c.total)}; up to {c.kept} at once in the run directory, "
        f"{shown(c.kept * c.total)}{host if c.first_rank else ''}"
    )


def _notes(plan: Plan) -> str:
    if not plan.config.model.compile:
        return ""
    return "torch.compile: on (activations are computed without it; compiled graphs hold less)"
