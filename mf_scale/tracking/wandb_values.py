"""What W&B gets of a line of metrics.jsonl: one law, for the client beside a training and for `mf-scale wandb-sync`.

    train/      loss, its terms, lr, grad_norm, matched, updates, skipped (in the interval), skipped_total, quarantined
    loss_layers/TERM/N  lr/GROUP  grad_norm/GROUP  speed/  phases/  memory/  validation/  evaluation/SPLIT/  straggler/

Every row carries "step", the axis of every chart. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mf_scale.tracking.starts import ending

STEP = "step"
"""Name of the axis."""
_HEAD = frozenset({"event", "step", "time", "start", "nonfinite"})
_SPEED = frozenset({"images_per_second", "step_time", "data_wait", "start_seconds"})
_OWN_SECTION = {"loss_layers": "loss_layers", "lrs": "lr", "grad_norms": "grad_norm", "phases": "phases"} | {
    "memory": "memory"
}
"""Keys of a step's line that hold several numbers, and the section of charts that these make."""


def wandb_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line of metrics.jsonl under their W&B names; {} for events that are no series.

    What is null there (it was not finite, or is not known) is left out.
    """
    event = record["event"]
    if event == "step":
        return dict(_numbers(_named_step(record)))
    if event in ("validation", "straggler"):
        return dict(_numbers({event: _body(record)}))
    if event == "evaluation":
        # "step" is where the run stood, "samples" is of the split: both would be flat lines.
        told = {name: value for name, value in _body(record).items() if name != "samples"}
        return dict(_numbers({f"evaluation/{record.get('split', 'val')}": told}))
    return {}


def wandb_summary(record: Mapping[str, Any]) -> dict[str, str | float]:
    """What a line changes of where the run stands, under the names of W&B's summary; {} for most events."""
    event, step = record["event"], record["step"]
    if event == "start":
        told = {"run/steps": record.get("steps"), "run/world": record.get("world"), "run/start": record.get("start")}
        return {"run/state": "running", "run/reason": ""} | {k: v for k, v in told.items() if v is not None}
    if event == "save":
        return {"run/saved_step": step}
    if event == "rollback":
        return {"run/state": "went back", "run/reason": f"the loss of step {record.get('spike')} jumped"}
    if event == "stop":
        state, reason = ending(record, None)
        return {"run/state": state or "ended", "run/reason": reason, "run/step": step} | (
            {"run/exit_code": record["exit_code"]} if "exit_code" in record else {}
        )
    return {}


def rows(records: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Step -> all its values, steps ascending; of several lines of one step the later ones count."""
    merged: dict[int, dict[str, float]] = {}
    for record in records:
        values = wandb_values(record)
        if values:
            merged.setdefault(record["step"], {}).update(row(record, values))
    return dict(sorted(merged.items()))


def row(record: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, float]:
    """The values with the axis, and the time at which they were measured in place of that of the sending."""
    time = {"_timestamp": record["time"]} if isinstance(record.get("time"), int | float) else {}
    return {STEP: record["step"], **time, **values}


def _named_step(record: Mapping[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in _body(record).items():
        if name in _OWN_SECTION:
            named[_OWN_SECTION[name]] = value
        else:
            named[f"{'speed' if name in _SPEED else 'train'}/{name}"] = value
    if isinstance(record.get("updates"), int):
        named["train/skipped_total"] = record["step"] - record["updates"]
    return named


def _body(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _HEAD}


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers under their names, those of a mapping as `name/inner`, those of a list as `name/0`, `name/1`, ..."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, list | tuple):
            yield from _numbers({f"{name}/{place}": item for place, item in enumerate(value)})
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
