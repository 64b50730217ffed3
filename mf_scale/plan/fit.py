"""Which ZeRO stage and which micro-batch a GPU has room for, and what would help where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mf_scale.config.schema import Config
from mf_scale.config.validate import BatchPlan, plan_batch
from mf_scale.distributed.deepspeed_config import deepspeed_dictionary
from mf_scale.errors import UserError
from mf_scale.plan.activations import Activations
from mf_scale.plan.sizes import GIB, divisors, shown
from mf_scale.plan.states import Layout, States, Tensors, count_states

MARGIN, LEAST_MARGIN = 0.10, 1.5 * GIB
"""Share of the memory that is left free, and how much at least: for what no tensor shows. That is CUDA's context and
the kernels' code (0.5 GiB), NCCL's buffers (up to 1 GiB with many channels), workspaces of cuDNN and cuBLAS, and the
holes in torch's cache; and the largest activations were up to 15% off on a CPU, which is where they are held to."""
Trace = Callable[[int], Activations]
_OFFLOADS = {0: [(False, False)], 1: [(False, False), (True, False)], 2: [(False, False), (True, False)]}
_OFFLOADS[3] = [(False, False), (True, False), (False, True), (True, True)]


@dataclass(frozen=True)
class Need:
    """What a GPU must hold under one layout."""

    states: States
    activations: Activations
    """Of the configured micro-batch."""
    largest: int | None = None
    """The largest micro-batch that fits; None: none does, or no memory was given."""

    @property
    def total(self) -> int:
        """Bytes of a GPU at its fullest."""
        return needed(self.states, self.activations)


@dataclass(frozen=True)
class Fit:
    """Of a memory."""

    memory: int
    usable: int
    """Without the margin."""
    choice: Need | None
    """The smallest stage at which the configured micro-batch fits, else the smallest at which any does."""
    micro_batch: int | None
    accumulation: int | None
    advice: tuple[str, ...] = ()
    """What would help, where nothing fits."""


def needed(states: States, activations: Activations) -> int:
    """The backward pass is the fullest moment, or the update behind it, when the activations are gone."""
    return states.gpu.total + max(activations.total, states.update)


def layouts(config: Config, plan: BatchPlan, *, offloads: bool) -> list[Layout]:
    """Every stage, with what the configuration offloads where that is possible; with `offloads` all combinations."""
    chosen = []
    for stage, ways in _OFFLOADS.items():
        own = (config.zero.offload_optimizer and stage > 0, config.zero.offload_parameters and stage == 3)
        chosen += [layout_of(config, plan, stage, *way) for way in (ways if offloads else [own])]
    return chosen


def layout_of(config: Config, plan: BatchPlan, stage: int, optimizer: bool, parameters: bool) -> Layout:
    """The layout that DeepSpeed is told at another stage than the configuration's, or at its own."""
    zero = replace(config.zero, stage=stage, offload_optimizer=optimizer, offload_parameters=parameters)
    # What the configuration adds to DeepSpeed's own is for its own stage.
    added = config.deepspeed if stage == config.zero.stage else {}
    told = deepspeed_dictionary(replace(config, zero=zero, deepspeed=added), plan, cuda=True)["zero_optimization"]
    standard = Layout(stage)
    return Layout(
        stage,
        optimizer,
        parameters,
        ranks=plan.world_size,
        accumulation=plan.accumulation,
        bucket=told["reduce_bucket_size"],
        contiguous=told["contiguous_gradients"],
        overlap=bool(told.get("overlap_comm", False)),
        persistent=told.get("stage3_param_persistence_threshold", standard.persistent),
        most_live=told.get("stage3_max_live_parameters", standard.most_live),
        ema=config.ema.decay > 0,
    )


def needs(
    config: Config, plan: BatchPlan, tensors: Tensors, trace: Trace, memory: int | None, *, offloads: bool
) -> list[Need]:
    """What every layout needs, and the largest micro-batch that fits it into `memory` bytes."""
    found = []
    for layout in layouts(config, plan, offloads=offloads):
        largest = None if memory is None else _largest(layout, plan, tensors, trace, usable_of(memory))
        found.append(Need(count_states(tensors, layout), trace(plan.micro_batch), largest))
    return found


def usable_of(memory: int) -> int:
    """Bytes, without the margin."""
    return memory - round(max(memory * MARGIN, LEAST_MARGIN))


def fit(found: Sequence[Need], plan: BatchPlan, memory: int, advise: Callable[[], tuple[str, ...]]) -> Fit:
    """The smallest stage that fits, without offloading where that does; `advise` is asked where nothing fits."""
    usable = usable_of(memory)
    order = sorted(found, key=lambda need: (_away(need), need.states.layout.stage))
    fitting = [need for need in order if need.largest is not None]
    if not fitting:
        return Fit(memory, usable, None, None, None, advise())
    choice = next((n for n in fitting if (n.largest or 0) >= plan.micro_batch), fitting[0])
    share = plan.micro_batch * plan.accumulation
    return Fit(memory, usable, choice, choice.largest, share // (choice.largest or 1))


def _away(need: Need) -> int:
    layout = need.states.layout
    return layout.offload_optimizer + layout.offload_parameters


def _largest(layout: Layout, plan: BatchPlan, tensors: Tensors, trace: Trace, usable: int) -> int | None:
    """By halving: what a larger micro-batch holds is more. Those that the global batch allows are tried, no others."""
    share = plan.micro_batch * plan.accumulation
    sizes = divisors(share)
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        own = count_states(tensors, replace(layout, accumulation=share // sizes[middle]))
        if needed(own, trace(sizes[middle])) <= usable:
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


def advice(
    config: Config,
    plan: BatchPlan,
    tensors: Tensors,
    tracer_of: Callable[[Config], Trace],
    memory: int,
    *,
    offloads: bool = False,
) -> tuple[str, ...]:
    """What would make room, each with what it then takes: computed, not guessed. `tracer_of` of a configuration.

    Each is tried at all stages, with a micro-batch of 1 (with `offloads` all offloading too), and told where the best
    of them needs less than the best does now.
    """
    usable = usable_of(memory)
    one = replace(plan, micro_batch=1, accumulation=plan.micro_batch * plan.accumulation)
    now = _least(layouts(config, one, offloads=offloads), tensors, tracer_of(config))[0]
    said = []

    def tried(name: str, changed: Config, chosen: Sequence[Layout]) -> None:
        try:
            total, layout = _least(chosen, tensors, tracer_of(changed))
        except UserError:
            return  # this cannot be done to this model
        if total < now:
            verdict = "fits" if total <= usable else "not enough by itself"
            stage = layout.name if name else str(layout.stage)
            told = f"{shown(total)} at stage {stage} with a micro-batch of 1, {verdict}"
            said.append(f"{name or _offloaded(layout)}: {told}")

    def any_stage(changed: Config, ranks: BatchPlan = one) -> list[Layout]:
        return layouts(changed, ranks, offloads=offloads)

    def away(changed: Config) -> list[Layout]:
        return [layout for layout in layouts(changed, one, offloads=True) if layout.offload_optimizer]

    model = config.model
    whole = replace(model, backbone=replace(model.backbone, recompute_stages=[1, 2, 3, 4]))
    recomputed = replace(config, model=whole)
    if model.pixel_level.builder is None and set(model.backbone.recompute_stages) != {1, 2, 3, 4}:
        tried("model.backbone.recompute_stages=[1,2,3,4]", recomputed, any_stage(recomputed))
    smaller = [max(64, side // 2 // 32 * 32) for side in config.data.crop]
    halved = replace(config, data=replace(config.data, crop=smaller))
    tried(f"data.crop=[{smaller[0]},{smaller[1]}]", halved, any_stage(halved))
    tried("", config, away(config))
    if (more := _more_ranks(config, plan.world_size)) is not None:
        tried(f"{more.world_size} GPUs instead of {plan.world_size}", config, any_stage(config, more))
    both = replace(recomputed, data=halved.data)
    if model.pixel_level.builder is None and not any(line.endswith(", fits") for line in said):
        tried("recomputing, the smaller crop and offloading together", both, away(both))
    return tuple(said)


def _offloaded(layout: Layout) -> str:
    return "zero.offload_optimizer=true" + " and zero.offload_parameters=true" * layout.offload_parameters


def _least(chosen: Sequence[Layout], tensors: Tensors, trace: Trace) -> tuple[int, Layout]:
    """The layout that needs least with a micro-batch of 1, and how much; of equals the first."""
    totals = [needed(count_states(tensors, layout), trace(1)) for layout in chosen]
    return min(zip(totals, chosen, strict=True), key=lambda pair: pair[0])


def _more_ranks(config: Config, ranks: int) -> BatchPlan | None:
    """The most ranks that the global batch can be cut for, where they are more."""
    for count in reversed(divisors(config.train.global_batch)):
        if count <= ranks:
            return None
        try:
            return plan_batch(config, count)
        except UserError:
            continue
    return None
