"""Where the time of a step goes: by phase, over the run and in sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mf_scale.tracking.report.chart_svg import SERIES
from mf_scale.tracking.report.charts import Chart, Line, Mark
from mf_scale.tracking.report.curves import Record, keys_of, number_in, some_of
from mf_scale.tracking.report.table import Cell, Column, Table, percent

PHASES = "phases"
_MEANING = {
    "data": "waiting for the input",
    "forward": "the model's forward pass",
    "loss": "matching and loss",
    "backward": "gradients, and their exchange between ranks",
    "optimizer": "clipping and the update",
    "other": "logging, hooks, and what no phase names",
    "all else": "everything but waiting for data: this run's lines tell no phases",
}


@dataclass(frozen=True)
class StepTime:
    """What the page shows of the time of a step."""

    chart: Chart
    table: Table
    shares: list[tuple[str, float, int]]
    """Phase, share of the step, place of its colour."""
    told: bool
    """False: an older run's lines, which know waiting for data only."""


def step_time(records: Sequence[Record], marks: Sequence[Mark]) -> StepTime | None:
    """The breakdown of the step times; None where no line tells of them."""
    steps = [r for r in records if r["event"] == "step"]
    told = [(r, r[PHASES]) for r in steps if isinstance(r.get(PHASES), Mapping) and _numbers(r[PHASES])]
    # Lines of an older program beside newer ones say less of the same: they are left out.
    parts = told or [(r, _two(r)) for r in steps if number_in(r, "step_time") and number_in(r, "data_wait")]
    parts = some_of(parts)
    if not parts:
        return None
    names = keys_of([phases for _, phases in parts])
    seconds = np.array([[float(phases.get(name, 0.0)) for name in names] for _, phases in parts])  # [lines,phases]
    at = [int(r["step"]) for r, _ in parts]
    # A line stands for the steps since the one before it.
    weights = np.array([max(1, b - a) for a, b in pairwise([0, *at])], dtype=float)
    means = np.average(seconds, axis=0, weights=weights)
    whole = float(means.sum()) or 1.0
    rows: list[list[Cell | str]] = []
    for i, name in enumerate(names):
        share = float(means[i]) / whole
        phase = Cell(name, small=_MEANING.get(name, ""), color=f"var(--series-{i % len(SERIES)})")
        high = float(np.quantile(seconds[:, i], 0.95))
        rows.append([phase, Cell(percent(share), bar=share), _ms(float(means[i])), _ms(high)])
    totals = seconds.sum(axis=1)
    rows.append(["a step", percent(1.0), _ms(whole), _ms(float(np.quantile(totals, 0.95)))])
    columns = [
        Column("phase", text=True),
        Column("% of a step"),
        Column("mean, ms"),
        Column("95 %, ms", about="95th percentile of the logging intervals' means"),
    ]
    lines = [Line(name, at, (1000 * seconds[:, i]).tolist()) for i, name in enumerate(names)]
    return StepTime(
        Chart("step-time", "Time of a step by phase", "ms", lines, marks, stacked=True),
        Table("phases", "A step on average", columns, rows),
        [(name, float(means[i]) / whole, i % len(SERIES)) for i, name in enumerate(names)],
        bool(told),
    )


def _two(record: Record) -> dict[str, float]:
    wait = float(record["data_wait"])
    return {"data": wait, "all else": max(0.0, float(record["step_time"]) - wait)}


def _numbers(phases: Mapping[str, Any]) -> bool:
    return bool(phases) and all(isinstance(value, int | float) for value in phases.values())


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"
