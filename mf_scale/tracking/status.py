"""The state of a run, from the files in its directory. What is not known is None, never guessed.

`mf-scale status` prints it, the report shows its starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mf_scale.rundir import MANIFEST, RunDir, checkpoint_step, committed_checkpoints
from mf_scale.tracking.alive import Holder, lock_holder
from mf_scale.tracking.history import History, read_history
from mf_scale.tracking.launches import read_launches
from mf_scale.tracking.progress import read_progress
from mf_scale.tracking.starts import DONE, GUARD, MISTAKE, WENT_BACK, Start, list_starts
from mf_scale.tracking.state import State, judge_state

_SETTLED = (DONE, GUARD, MISTAKE)
"""Ends after which no job waits any more."""


@dataclass(frozen=True)
class Speed:
    """Means over steps, saves and validations left out."""

    images_per_second: float | None
    step_seconds: float | None
    data_wait_seconds: float | None


@dataclass(frozen=True)
class Checkpoint:
    """The newest committed checkpoint."""

    step: int
    name: str
    time: float
    """Unix seconds of its commit."""
    bytes: int | None
    seconds: float | None
    """What the save took, behind the training."""
    stall: float | None
    """Seconds the training stood still for it."""


@dataclass(frozen=True)
class Validation:
    """The last validation."""

    step: int
    loss: float | None


@dataclass(frozen=True)
class RunStatus:
    """Everything that can be said of a run. Times are Unix seconds, spans seconds."""

    run: str
    asked: float
    """When this was found out."""
    state: State
    heard: float | None
    """The last sign of life."""
    step: int
    steps: int | None
    """Steps of the whole run."""
    updates: int | None
    skipped: int | None
    """Steps without an update."""
    quarantined: int
    loss: float | None
    last: Speed | None
    """Over the last logging interval."""
    hour: Speed | None
    """Over the last hour of training."""
    eta_seconds: float | None
    """At the recent speed, validation and saving included."""
    eta_with_restarts_seconds: float | None
    """At the speed since the run's beginning, waiting, restarts and lost work included."""
    checkpoint: Checkpoint | None
    unsaved_steps: int
    """What a crash now would lose."""
    validation: Validation | None
    restarts: int
    lost_steps: int
    lost_images: int | None
    lost_seconds: float | None
    down_seconds: float
    """Between starts, until there was a step again."""
    starts: tuple[Start, ...]


def run_status(
    run: RunDir, *, queue: Callable[[str], str | None] = lambda _: None, now: float | None = None
) -> RunStatus:
    """The state of a run; `queue` is asked what SLURM says of a job: "STATE REASON", "": unknown to it, None: nobody
    knows."""
    history = read_history(run.metrics)
    starts = list_starts(history.sessions, read_progress(run), read_launches(run))
    holder, checkpoint = lock_holder(run), _checkpoint(run, history)
    job = starts[-1].job if starts and starts[-1].end not in _SETTLED else None
    said = queue(job) if job else None
    return describe(run, history, starts, holder, checkpoint, said, time.time() if now is None else now)


def describe(
    run: RunDir,
    history: History,
    starts: Sequence[Start],
    holder: Holder | None,
    checkpoint: Checkpoint | None,
    queue: str | None,
    now: float,
) -> RunStatus:
    """The state of a run from what was read. Pure."""
    state = judge_state(starts, holder, queue, now)
    trained = [start for start in starts if start.number is not None]
    saved = checkpoint.step if checkpoint else 0
    step = trained[-1].reached if trained else saved
    steps = history.sessions[-1].event.get("steps") if history.sessions else None
    line = history.last_line or {}
    updates = line.get("updates")
    left = max(0, steps - step) if isinstance(steps, int) else None
    hour = _hour(history)
    lost = trained[:-1]
    return RunStatus(
        run=str(run.path),
        asked=now,
        state=state,
        heard=max((start.heard for start in starts), default=None),
        step=step,
        steps=steps,
        updates=updates,
        skipped=line["step"] - updates if isinstance(updates, int) else None,
        quarantined=history.quarantined,
        loss=line.get("loss"),
        last=_speed(line) if line else None,
        hour=hour,
        eta_seconds=_times(left, _recent_seconds(history, hour)),
        eta_with_restarts_seconds=_times(left, _life_seconds(starts, step, now if state.lives else None)),
        checkpoint=checkpoint,
        unsaved_steps=max(0, step - saved),
        validation=_validation(history),
        restarts=sum(start.end != WENT_BACK for start in starts[:-1]),
        lost_steps=sum(start.lost_steps or 0 for start in lost),
        lost_images=_sum([start.lost_images for start in lost]),
        lost_seconds=_sum([start.lost_seconds for start in lost]),
        down_seconds=_down(starts),
        starts=tuple(starts),
    )


def _checkpoint(run: RunDir, history: History) -> Checkpoint | None:
    folder = next(iter(committed_checkpoints(run)), None)
    if folder is None:
        return None
    step = checkpoint_step(folder)
    save: dict[str, Any] = next((one for one in reversed(history.saves) if one["step"] == step), {})
    return Checkpoint(
        step=step,
        name=run.checkpoint(step).name,
        time=float(save["time"]) if save else _changed(folder),
        bytes=save.get("bytes"),
        seconds=save.get("seconds"),
        stall=save.get("stall"),
    )


def _changed(folder: Path) -> float:
    try:
        return (folder / MANIFEST).stat().st_mtime
    except OSError:  # being removed
        return folder.stat().st_mtime if folder.exists() else 0.0


def _validation(history: History) -> Validation | None:
    told = history.validation
    return Validation(told["step"], told.get("loss")) if told else None


def _speed(line: dict[str, Any]) -> Speed:
    return Speed(line.get("images_per_second"), line.get("step_time"), line.get("data_wait"))


def _hour(history: History) -> Speed | None:
    """Means over the steps of the recent lines."""
    lines = history.recent
    if not lines:
        return None
    pairs = [(max(1, b["step"] - a["step"]), b) for a, b in pairwise(lines)] or [(1, lines[-1])]
    step, wait = _mean(pairs, "step_time"), _mean(pairs, "data_wait")
    images = sum(weight * b["step_time"] * b["images_per_second"] for weight, b in pairs
                 if _numbers(b, "step_time", "images_per_second"))  # fmt: skip
    seconds = sum(weight * b["step_time"] for weight, b in pairs if _numbers(b, "step_time", "images_per_second"))
    return Speed(images / seconds if seconds else None, step, wait)


def _mean(pairs: Sequence[tuple[int, dict[str, Any]]], name: str) -> float | None:
    known = [(weight, line[name]) for weight, line in pairs if _numbers(line, name)]
    return sum(weight * value for weight, value in known) / sum(weight for weight, _ in known) if known else None


def _numbers(line: dict[str, Any], *names: str) -> bool:
    return all(isinstance(line.get(name), int | float) for name in names)


def _recent_seconds(history: History, hour: Speed | None) -> float | None:
    """Seconds a step takes at present, by the clock; where the newest start has told of too few, by the means."""
    began = history.sessions[-1].began if history.sessions else 0.0
    lines = [line for line in history.recent if line["time"] >= began]
    steps = lines[-1]["step"] - lines[0]["step"] if lines else 0
    if steps > 0:
        return float(lines[-1]["time"] - lines[0]["time"]) / steps
    return hour.step_seconds if hour else None


def _life_seconds(starts: Sequence[Start], step: int, now: float | None) -> float | None:
    """Seconds a step took since the run began; until its last sign of life where it does not go on."""
    if not starts or not step:
        return None
    began = starts[0].launched or starts[0].began
    until = now if now is not None else max(start.heard for start in starts)
    return (until - began) / step if began and until > began else None


def _down(starts: Sequence[Start]) -> float:
    """Without counting twice what passed between two starts of which the later one never took a step."""
    spans = [start.down_seconds or 0.0 for n, start in enumerate(starts) if n == 0 or starts[n].first_step]
    return sum(spans)


def _times(left: int | None, seconds: float | None) -> float | None:
    return None if left is None or (left and seconds is None) else left * (seconds or 0.0)


def _sum(values: Sequence[Any]) -> Any:
    return None if any(value is None for value in values) else sum(values)
