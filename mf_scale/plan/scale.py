"""What a run asks of storage and loses to failures: figures, each with its formula in symbols and in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mf_scale.config.schema import Config
from mf_scale.data.repeat import STRIDE
from mf_scale.plan import formulas as f
from mf_scale.plan.assumed import Known
from mf_scale.plan.scale_numbers import number, seconds, share, size
from mf_scale.plan.sizes import GIB
from mf_scale.plan.written import SavedModel, Written, count_written


@dataclass(frozen=True)
class Figure:
    """One number."""

    name: str
    """Of the JSON: it ends in its unit."""
    title: str
    value: float
    shown: str
    symbols: str
    numbers: str


@dataclass(frozen=True)
class Scale:
    """All of them."""

    figures: tuple[Figure, ...]
    written: tuple[Written, ...]
    """Files of a checkpoint by ZeRO stage."""
    known: Mapping[str, Known]
    unknown: tuple[str, ...]
    """What is left out, and what would tell it."""


@dataclass(frozen=True)
class _Run:
    """What the figures are made of."""

    config: Config
    ranks: int
    nodes: int
    known: Mapping[str, Known]
    written: Written
    """At the configured stage."""
    step_seconds: float | None

    def of(self, name: str) -> float:
        return self.known[name].value

    @property
    def gpus_a_node(self) -> int:
        return -(-self.ranks // self.nodes)

    @property
    def worker_lanes(self) -> int:
        """At most, also where the batch cannot be shared evenly."""
        return f.worker_lanes(-(-self.config.train.global_batch // self.ranks), self.config.data.workers)

    @property
    def block(self) -> int:
        """Samples that belong to one read if they fit."""
        return self.config.data.block_samples if self.config.data.shuffle == "blocks" else 1

    @property
    def buffered(self) -> float:
        """Bytes of a worker's blocks."""
        return f.buffered_bytes(self.worker_lanes, self.block, self.of("image_bytes"))

    @property
    def fits(self) -> bool:
        return self.buffered <= self.config.data.buffer_mib * 2**20


def look_at_scale(
    config: Config, ranks: int, nodes: int, known: Mapping[str, Known], saved: SavedModel, total_rate: float | None
) -> Scale:
    """Of a run of `ranks` GPUs on `nodes` nodes; `total_rate`: images a second of all of them, where it is known."""
    written = tuple(count_written(saved, stage, ranks, ema=config.ema.decay > 0) for stage in range(4))
    step = config.train.global_batch / total_rate if total_rate else None
    run = _Run(config, ranks, nodes, known, written[config.zero.stage], step)
    figures = [*(_data(run) if "images" in known else ()), *_lanes(run), *_storage(run), *_saves(run)]
    unknown = [] if "images" in known else ["the size of index, order and data without --assume images=N"]
    unknown += [] if step else ["bytes/s and steps without --images-per-second of one GPU, or --measure"]
    if all(figure.name != "lost_seconds" for figure in figures):
        unknown.append("what a failure costs without a step's time or checkpoint.every_minutes")
    return Scale(tuple(figures), written, known, tuple(unknown))


def _data(run: _Run) -> Iterator[Figure]:
    images, key, classes = (run.of(name) for name in ("images", "key_bytes", "image_classes"))
    block, repeats = run.config.data.block_samples, run.config.data.repeat_threshold > 0
    shards, vocabulary = math.ceil(images / run.of("shard_images")), run.config.model.num_classes or 0
    value = f.index_bytes(images, key, classes, shards, vocabulary)
    yield Figure(
        "index_bytes",
        "index",
        value,
        size(value),
        "images x (48 + key_bytes + 4 x image_classes) + tars x 139 + classes x 63",
        f"{images:,.0f} x (48 + {number(key)} + 4 x {number(classes)}) B + {shards:,} x 139 B + {vocabulary:,} x 63 B",
    )
    blocks = f.blocks_of(images, run.of("shard_images"), block)
    value = f.order_bytes(blocks, round(images), repeats=repeats)
    more = f" + 8 B x ({blocks:,} + {images:,.0f} / {STRIDE})" if repeats else ""
    yield Figure(
        "order_bytes",
        "order, a process",
        value,
        size(value),
        "blocks x (8 + 2 x 12)" + f" + 8 x (blocks + images / {STRIDE})" * repeats,
        f"{blocks:,} blocks x 32 B{more}",
    )
    value = images * run.of("image_bytes")
    yield Figure(
        "data_bytes",
        "data",
        value,
        size(value),
        "images x image_bytes",
        f"{images:,.0f} x {number(run.of('image_bytes'))} B",
    )


def _lanes(run: _Run) -> Iterator[Figure]:
    data, batch, image = run.config.data, run.config.train.global_batch, run.of("image_bytes")
    lanes = batch // run.ranks if batch % run.ranks == 0 else 0
    if not lanes:
        return  # the plan says above that the batch cannot be shared
    own, block = run.worker_lanes, run.block
    yield Figure(
        "lanes",
        "lanes",
        batch,
        f"{batch:,}",
        "global batch; / GPUs of a rank; / workers of a worker",
        f"{batch:,} / {run.ranks:,} = {lanes:,} of a rank, {own:,} of each of {data.workers} workers",
    )
    verdict = "fit" if run.fits else "do not fit, samples are read singly"
    yield Figure(
        "worker_buffer_bytes",
        "blocks, a worker",
        run.buffered,
        size(run.buffered),
        "worker's lanes x block_samples x image_bytes",
        f"{own:,} x {block} x {number(image)} B; {verdict}: data.buffer_mib = {data.buffer_mib}",
    )
    if "images" in run.known:
        value = f.read_twice(batch, block, run.of("images")) if run.fits and block > 1 else 0.0
        yield Figure(
            "read_twice_share",
            "read twice, at most",
            value,
            share(value),
            "lanes x block_samples / images",
            f"{batch:,} x {block} / {run.of('images'):,.0f}" if value else "samples are read one by one",
        )
    if data.cache_dir and "images" in run.known:
        total = run.of("images") * image
        value = f.cached_share(data.cache_gib * GIB, total)
        yield Figure(
            "cached_share",
            "from the cache",
            value,
            f"up to {share(value)}",
            "cache_gib / data, of a node's reads once it is full",
            f"{data.cache_gib:g} GiB / {size(total)}",
        )


def _storage(run: _Run) -> Iterator[Figure]:
    if run.step_seconds is None:
        return
    batch, image, step = run.config.train.global_batch, run.of("image_bytes"), run.step_seconds
    value = f.bytes_a_second(batch, image, step)
    yield Figure(
        "storage_bytes_a_second",
        "from storage",
        value,
        f"{size(value)}/s",
        "global batch x image_bytes / step; / nodes of a node",
        f"{batch:,} x {number(image)} B / {seconds(step)}; {size(value / run.nodes)}/s a node",
    )
    block = run.block if run.fits else 1
    value = f.requests_a_second(batch, block, step)
    yield Figure(
        "reads_a_second",
        "reads",
        value,
        f"{number(value)}/s",
        "global batch / block_samples / step",
        f"{batch:,} / {block} / {seconds(step)}, of {size(block * image)} each",
    )


def _saves(run: _Run) -> Iterator[Figure]:
    save, written, step = run.config.checkpoint, run.written, run.step_seconds
    node = f.node_bytes(written.first_rank, written.other_rank, run.gpus_a_node)
    write = node / (run.of("write_gib_s") * GIB)
    yield Figure(
        "write_seconds",
        "a checkpoint's write",
        write,
        seconds(write),
        "(rank 0 + (GPUs of a node - 1) x another) / write_gib_s",
        f"({size(written.first_rank)} + {run.gpus_a_node - 1} x {size(written.other_rank)}) "
        f"/ {number(run.of('write_gib_s'))} GiB/s",
    )
    copied = max(written.first_rank, written.other_rank)
    fixed = run.of("save_seconds")
    stall = f.save_stall(copied, run.of("copy_gib_s") * GIB, fixed) if save.asynchronous else write + fixed
    yield Figure(
        "stall_seconds",
        "save stall",
        stall,
        seconds(stall),
        "largest rank / copy_gib_s + save_seconds" if save.asynchronous else "a checkpoint's write",
        f"{size(copied)} / {number(run.of('copy_gib_s'))} GiB/s, the write goes on behind"
        if save.asynchronous
        else f"{seconds(write)} + {seconds(fixed)}: checkpoint.asynchronous=false waits for the write",
    )
    failures = f.failures_a_day(run.ranks, run.of("gpu_hours"))
    stops = run.of("preemptions")
    yield Figure(
        "restarts_a_day",
        "restarts a day",
        failures + stops,
        number(failures + stops),
        "24 x GPUs / gpu_hours + preemptions",
        f"24 x {run.ranks:,} / {number(run.of('gpu_hours'))} + {number(stops)}: one in "
        f"{seconds(f.seconds_between(failures + stops))}",
    )
    interval = f.save_interval(save.every_minutes, save.every_steps, step)
    if interval is not None:
        yield from _losses(run, interval, stall, write, failures)


def _losses(run: _Run, interval: float, stall: float, write: float, failures: float) -> Iterator[Figure]:
    save, step, start = run.config.checkpoint, run.step_seconds, run.of("start_seconds")
    behind = write if save.asynchronous else 0.0
    clock = f"{save.every_minutes:g} min" if save.every_minutes else ""
    steps = f"{save.every_steps:,} x {seconds(step)}" if save.every_steps and step else ""
    yield Figure(
        "save_interval_seconds",
        "between checkpoints",
        interval,
        seconds(interval),
        "the sooner of every_minutes and every_steps x step",
        f"the sooner of {clock} and {steps}" if clock and steps else clock or steps,
    )
    lost = f.lost_work(interval, behind)
    undone = f", {lost / step:,.0f} steps" if step else ""
    yield Figure(
        "lost_seconds",
        "work lost, a failure",
        lost,
        seconds(lost),
        "interval / 2 + the write behind; none at an announced stop",
        f"{seconds(interval)} / 2 + {seconds(behind)}{undone}",
    )
    yield Figure(
        "cost_seconds",
        "a failure costs",
        lost + start,
        seconds(lost + start),
        "work lost + start_seconds",
        f"{seconds(lost)} + {seconds(start)}, times {run.ranks:,} GPUs",
    )
    best = f.best_interval(stall, f.seconds_between(failures))
    yield Figure(
        "best_interval_seconds",
        "best interval",
        best,
        seconds(best),
        "sqrt(2 x stall x time between failures); not below the write",
        f"sqrt(2 x {seconds(stall)} x {seconds(f.seconds_between(failures))}); "
        f"checkpoint.every_minutes = {max(best, write) / 60:.2g}",
    )
    value = f.goodput(interval, stall, failures, lost + start, run.of("preemptions"), start + write)
    yield Figure(
        "goodput",
        "time that trains",
        value,
        share(value),
        "interval / (interval + stall) x (1 - (failures x cost + stops x (start_seconds + write)) / day)",
        f"{seconds(interval)} / ({seconds(interval)} + {seconds(stall)}) x (1 - {number(failures)} x "
        f"{seconds(lost + start)} / 24 h)"
        + (f" with {number(run.of('preemptions'))} stops of {seconds(start + write)}" if run.of("preemptions") else ""),
    )
