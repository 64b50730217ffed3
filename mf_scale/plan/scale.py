"""What a run asks of storage and loses to failures: figures, each with its formula in symbols and in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mf_scale.config.schema import Config
from mf_scale.plan import formulas as f
from mf_scale.plan.assumed import Known
from mf_scale.plan.scale_numbers import number, seconds, share, size
from mf_scale.plan.scale_reading import of_data, of_lanes, of_storage
from mf_scale.plan.scale_run import Figure, Run
from mf_scale.plan.sizes import GIB
from mf_scale.plan.written import SavedModel, Written, count_written


@dataclass(frozen=True)
class Scale:
    """All of them."""

    figures: tuple[Figure, ...]
    written: tuple[Written, ...]
    """Files of a checkpoint by ZeRO stage."""
    known: Mapping[str, Known]
    unknown: tuple[str, ...]
    """What is left out, and what would tell it."""


def look_at_scale(
    config: Config, ranks: int, nodes: int, known: Mapping[str, Known], saved: SavedModel, total_rate: float | None
) -> Scale:
    """Of a run of `ranks` GPUs on `nodes` nodes; `total_rate`: images a second of all of them, where it is known."""
    written = tuple(count_written(saved, stage, ranks, ema=config.ema.decay > 0) for stage in range(4))
    step = config.train.global_batch / total_rate if total_rate else None
    run = Run(config, ranks, nodes, known, written[config.zero.stage], step)
    figures = [*(of_data(run) if "images" in known else ()), *of_lanes(run), *of_storage(run), *_saves(run)]
    unknown = [] if "images" in known else ["the size of index, order and data without --assume images=N"]
    unknown += [] if step else ["bytes/s and steps without --images-per-second of one GPU, or --measure"]
    if all(figure.name != "lost_seconds" for figure in figures):
        unknown.append(f"what a failure costs{_why_no_cost(config)}")
    return Scale(tuple(figures), written, known, tuple(unknown))


def _why_no_cost(config: Config) -> str:
    if not (config.checkpoint.every_steps or config.checkpoint.every_minutes):
        return ": no checkpoint is written on the way (checkpoint.every_steps and every_minutes are 0)"
    return " without a step's time or checkpoint.every_minutes"


def _saves(run: Run) -> Iterator[Figure]:
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


def _losses(run: Run, interval: float, stall: float, write: float, failures: float) -> Iterator[Figure]:
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
