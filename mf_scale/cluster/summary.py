"""The table of a sweep: what varies, and how far each run is. Renewed at the end of each of its tasks."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mf_scale.cluster.grid import Run
from mf_scale.cluster.sweep import records, shown
from mf_scale.rundir import RunDir, disk_errors, write_atomically
from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.state import NOT_STARTED, SILENT
from mf_scale.tracking.status import run_status

_TRIES = 5


@dataclass(frozen=True)
class Row:
    """One run of a sweep. None: not known (yet)."""

    run: str
    values: Mapping[str, Any]
    state: str
    step: int
    loss: float | None
    """Of the last line."""
    best_validation: float | None
    mIoU: float | None  # noqa: N815 - its name everywhere
    PQ: float | None
    images_per_second: float | None
    restarts: int
    over: bool
    """It goes on by nobody's hand, or not at all."""


def renew_summary(root: Path) -> tuple[str, bool]:
    """Write ROOT/summary.md and summary.json anew; the table, and whether every run is over. Raises UserError."""
    rows = collect(root)
    for _ in range(_TRIES):
        text = table(rows)
        _write(root / "summary.md", f"# {root.name}\n\n{text}\n")
        _write(root / "summary.json", json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n")
        # Another task that ended meanwhile may have written before this one did, and known more.
        now = collect(root)
        if now == rows:
            break
        rows = now
    return table(rows), all(row.over for row in rows)


def collect(root: Path) -> list[Row]:
    """What is known of the runs of a sweep, in the order of its grids."""
    return [_row(root, run) for run in records(root)]


def table(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown; mIoU and PQ in percent."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    heads = ["run", *keys, "state", "step", "loss", "best validation", "mIoU", "PQ", "images/s", "restarts"]
    lines = [heads]
    for row in rows:
        values = [shown(row.values[key]) if key in row.values else "" for key in keys]
        numbers = [_number(row.loss), _number(row.best_validation), _percent(row.mIoU), _percent(row.PQ)]
        speed = "-" if row.images_per_second is None else f"{row.images_per_second:.1f}"
        lines.append([row.run, *values, row.state, f"{row.step:,}", *numbers, speed, str(row.restarts)])
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [heads, rule, *lines[1:]]
    )


def _row(root: Path, run: Run) -> Row:
    folder = RunDir(root / run.name)
    status = run_status(folder, now=time.time())
    lines = read_metrics(folder.metrics)
    losses = [line.get("loss") for line in lines if line["event"] == "validation"]
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    newest = next((line for line in reversed(evaluations) if line.get("split") == "val"), (evaluations or [{}])[-1])
    return Row(
        run=run.name,
        values=run.values,
        state=status.state.word,
        step=status.step,
        loss=status.loss,
        best_validation=min((loss for loss in losses if isinstance(loss, int | float)), default=None),
        mIoU=newest.get("mIoU"),
        PQ=newest.get("PQ"),
        images_per_second=status.last.images_per_second if status.last else None,
        restarts=status.restarts,
        # Silent: its node was lost, and SLURM may bring it back.
        over=not status.state.lives and status.state.word not in (NOT_STARTED, SILENT),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _write(file: Path, text: str) -> None:
    """Whole or not at all, also where tasks on several nodes write at once."""
    mine = file.with_name(f".{socket.gethostname()}-{os.getpid()}-{file.name}")
    write_atomically(mine, text)
    with disk_errors(file):
        mine.replace(file)
