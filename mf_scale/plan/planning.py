"""One configuration, planned: everything that `mf-scale plan` says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mf_scale.config.consent import belongs_to_a_checkpoint, refuse_unasked_code
from mf_scale.config.load import load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import BatchPlan, plan_batch, validate
from mf_scale.errors import UserError
from mf_scale.models.class_embeddings import class_rows
from mf_scale.plan.assumed import settle
from mf_scale.plan.checkpoints import Checkpoints, count_checkpoints
from mf_scale.plan.dataset import Dataset, look_at_dataset, worker_rate
from mf_scale.plan.parts import Part, look_at_model, sum_of
from mf_scale.plan.scale import Scale, look_at_scale
from mf_scale.plan.sizes import divisors
from mf_scale.plan.states import Layout, States, Tensors, count_states
from mf_scale.plan.time import Cores, Duration, Rate, cores, duration

if TYPE_CHECKING:
    from mf_scale.plan.activations import Activations
    from mf_scale.plan.fit import Fit, Need, Trace


@dataclass(frozen=True)
class Wanted:
    """What is asked about."""

    ranks: int
    nodes: int = 1
    memory: int | None = None
    """Bytes of a GPU."""
    device: str = "cuda"
    """Whose activations are computed: cuda or cpu."""
    measure: bool = False
    images_per_second: float | None = None
    """Of one GPU, given."""
    worker_rate: float | None = None
    """Samples a second of one loader process, given."""
    offloads: bool = False
    activations: bool = True
    """Trace a micro-batch; a table of configurations without a memory size does not."""
    assumed: Mapping[str, float] = field(default_factory=dict)
    """Of data and machines, by name, given."""


@dataclass(frozen=True)
class Plan:
    """One configuration, planned for `wanted.ranks` ranks."""

    file: str
    config: Config
    wanted: Wanted
    parts: tuple[Part, ...]
    batches: tuple[BatchPlan, ...]
    """One for every number of ranks up to `ranks` that the global batch can be cut for."""
    refusal: str | None
    """Why it cannot be cut for `ranks` itself."""
    states: States
    """At the configured stage."""
    dataset: Dataset
    segments: int
    """Of an image, that the loss is computed for."""
    needs: tuple[Need, ...]
    """By stage; empty where no activations were asked for or the batch cannot be cut."""
    measured: Activations | None
    """The micro-batch that ran here, and on what."""
    measured_on: str | None
    fit: Fit | None
    duration: Duration
    cores: Cores
    checkpoints: Checkpoints
    scale: Scale

    @property
    def ranks(self) -> int:
        """Planned for."""
        return self.wanted.ranks

    @property
    def cut(self) -> BatchPlan | None:
        """How the global batch is cut for them."""
        return self.batches[-1] if self.refusal is None else None

    @property
    def total(self) -> Part:
        """The whole model."""
        return sum_of(self.parts)


def plan_config(file: str, overrides: Sequence[str], wanted: Wanted | int) -> Plan:
    """Plan the configuration of `file` with the dot-list `overrides`; a number is one of ranks. Raises UserError."""
    wanted = Wanted(wanted, activations=False) if isinstance(wanted, int) else wanted
    config = load_config(file, overrides)
    validate(config)
    if belongs_to_a_checkpoint(Path(file)):
        refuse_unasked_code(config, overrides, Path(file))
    dataset = look_at_dataset(config)
    known = settle(wanted.assumed, dataset, config.train.global_batch)
    if config.model.num_classes is None and dataset.classes is not None:
        config = replace(config, model=replace(config.model, num_classes=dataset.classes))
    if dataset.indexes:
        class_rows(config.model.class_embeddings, dataset.indexes[0].vocabulary)
    parts, tensors, saved = look_at_model(config, where=file)
    batches, refusal = _batches(config, wanted.ranks)
    cut = batches[-1] if refusal is None else None
    segments = _segments(config, dataset)
    found, measured, gpu, chosen = _on_gpus(file, config, wanted, tensors, cut, dataset, segments)
    worker = _worker(config, wanted, dataset)
    images = round(known["images"].value) if "images" in known else None
    took = duration(config, wanted.ranks, images, gpu)
    scale = look_at_scale(config, wanted.ranks, wanted.nodes, known, saved, took.total)
    return Plan(
        file=file,
        config=config,
        wanted=wanted,
        parts=parts,
        batches=batches,
        refusal=refusal,
        states=count_states(tensors, _layout(config, wanted.ranks, cut)),
        dataset=dataset,
        segments=segments,
        needs=tuple(found),
        measured=measured[0] if measured else None,
        measured_on=measured[1] if measured else None,
        fit=chosen,
        duration=took,
        cores=cores(config, wanted.ranks, wanted.nodes, took.total, worker),
        checkpoints=count_checkpoints(tensors, config, scale.written[config.zero.stage]),
        scale=scale,
    )


def _on_gpus(
    file: str,
    config: Config,
    wanted: Wanted,
    tensors: Tensors,
    cut: BatchPlan | None,
    dataset: Dataset,
    segments: int,
) -> tuple[list[Need], tuple[Activations, str] | None, Rate | None, Fit | None]:
    """By stage what is needed, the micro-batch that ran here, one GPU's images a second, what fits."""
    given = wanted.images_per_second
    gpu = Rate(given, "given") if given else None
    if cut is None or not wanted.activations:
        return [], None, gpu, None
    from mf_scale.plan.activations import Tracer
    from mf_scale.plan.fit import advice, fit, needs

    def tracer_of(changed: Config) -> Trace:
        return Tracer(changed, segments=segments, device=wanted.device, where=file)

    measured = None
    if wanted.measure:
        from mf_scale.plan.micro_batch import measure

        index = dataset.indexes[0] if dataset.indexes else None
        ran = measure(config, cut.micro_batch, index=index, segments=segments)
        measured = (ran.activations, ran.device)
        gpu = gpu or Rate(ran.images_per_second, f"measured on one {ran.device} here")
    trace, memory = tracer_of(config), wanted.memory
    try:
        found = needs(config, cut, tensors, trace, memory, offloads=wanted.offloads)
    except UserError:
        if measured is None:
            raise
        return [], measured, gpu, None  # a model that cannot be traced; what was measured is said
    chosen = None
    if memory is not None:
        chosen = fit(
            found, cut, memory, lambda: advice(config, cut, tensors, tracer_of, memory, offloads=wanted.offloads)
        )
    return found, measured, gpu, chosen


def _layout(config: Config, ranks: int, cut: BatchPlan | None) -> Layout:
    from mf_scale.plan.fit import layout_of

    zero = config.zero
    plan = cut or BatchPlan(config.train.global_batch, 1, 1, ranks)
    return layout_of(config, plan, zero.stage, zero.offload_optimizer, zero.offload_parameters)


def _segments(config: Config, dataset: Dataset) -> int:
    """Of an image at most; those beyond the queries have no pair."""
    return min(dataset.segments, config.model.decoder.queries)


def _worker(config: Config, wanted: Wanted, dataset: Dataset) -> Rate | None:
    if wanted.worker_rate:
        return Rate(wanted.worker_rate, "given")
    if not wanted.measure:
        return None
    rate, what = worker_rate(config, dataset)
    return Rate(rate, f"measured on one core here, {what}")


def _batches(config: Config, ranks: int) -> tuple[tuple[BatchPlan, ...], str | None]:
    """Of every number of ranks that divides the global batch, no others can share it; and why not for `ranks`."""
    plans, refusal = [], None
    for count in sorted({*(divisor for divisor in divisors(config.train.global_batch) if divisor < ranks), ranks}):
        try:
            plans.append(plan_batch(config, count))
        except UserError as error:
            refusal = str(error) if count == ranks else None
    return tuple(plans), refusal
