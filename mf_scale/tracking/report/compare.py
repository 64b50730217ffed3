"""Runs side by side: their numbers, and what differs in their configurations, as text and for a page."""

from __future__ import annotations

import statistics
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mf_scale.errors import UserError
from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.report.curves import MEASURES, Record, finite
from mf_scale.tracking.report.evaluations import read_evaluations
from mf_scale.tracking.report.table import percent
from mf_scale.tracking.status import RunStatus, run_status

MOST_RUNS = 24
"""Runs at once: beyond, no eye tells their curves apart."""
MOST_KEYS = 60
"""Differing keys that the terminal shows."""
_WIDEST = 28
"""Characters of a value in the terminal."""
_OWN = ("run_dir", "tracking.name")
"""Keys that differ between any two runs."""
_ABSENT = "-"


@dataclass(frozen=True)
class Compared:
    """One run among others."""

    letter: str
    name: str
    status: RunStatus
    records: list[Record]
    evaluations: Mapping[str, Mapping[str, Any]]
    """Split -> its evaluation."""
    config: Mapping[str, str]
    """Key -> value; what the program, the ranks and the libraries were stands there too, in brackets."""


@dataclass(frozen=True)
class Numbers:
    """Rows of cells under heads, one row a run."""

    heads: list[str]
    rows: list[list[str]]


def read_runs(runs: Sequence[RunDir]) -> list[Compared]:
    """Everything that is compared; UserError for too few or too many runs, twice the same, and one without metrics."""
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UserError(
            f"{len(runs)} run{'s' * (len(runs) != 1)} cannot be compared",
            remedy=f"Name 2 to {MOST_RUNS} run directories.",
        )
    paths = [run.path.resolve() for run in runs]
    twice = next((str(path) for i, path in enumerate(paths) if path in paths[:i]), None)
    if twice is not None:
        raise UserError("a run is named twice", where=twice, remedy="Name every run once.")
    names = _short_names([path.parts for path in paths])
    return [_read(run, *labels) for run, *labels in zip(runs, string.ascii_uppercase, names, strict=False)]


def numbers(runs: Sequence[Compared]) -> Numbers:
    """Step, loss, measures of every split, speed, restarts: a row a run."""
    last = [max((int(r["step"]) for r in run.records if r["event"] == "step"), default=0) for run in runs]
    common = min(last)
    uneven = common > 0 and common < max(last)
    splits = sorted({split for run in runs for split in run.evaluations})
    wanted = [
        (f"{measure} {split}", split, measure)
        for split in splits
        for measure in MEASURES
        if any(run.evaluations.get(split, {}).get(measure) is not None for run in runs)
    ]
    heads = ["run", "state", "step", "loss", *([f"loss at {common:,}"] if uneven else []), "validation"]
    heads += [*(head for head, _, _ in wanted), "images/s", "step ms", "restarts", "lost steps"]
    rows = []
    for run in runs:
        row = [f"{run.letter} {run.name}", run.status.state.word, _step(run.status), _number(run.status.loss)]
        row += [_number(_loss_at(run.records, common))] if uneven else []
        row += [_number(run.status.validation.loss if run.status.validation else None)]
        row += [percent(run.evaluations.get(split, {}).get(measure), 2) for _, split, measure in wanted]
        times = _median(run.records, "step_time")
        row += [_number(_median(run.records, "images_per_second")), _number(None if times is None else 1000 * times)]
        rows.append([*row, f"{run.status.restarts:,}", f"{run.status.lost_steps:,}"])
    return Numbers(heads, rows)


def differences(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of every key that is not the same in all."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = [(key, [run.config.get(key, _ABSENT) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def as_text(runs: Sequence[Compared]) -> str:
    """What the terminal shows."""
    told = numbers(runs)
    lines = _grid([told.heads, *told.rows], left=2)
    differ = differences(runs)
    if not differ:
        return "\n".join([*lines, "", "the configurations are the same"])
    rows = [["key", *(run.letter for run in runs)], *([key, *values] for key, values in differ[:MOST_KEYS])]
    lines += ["", "what differs", *_grid([[_cut(cell) for cell in row] for row in rows], left=len(runs) + 1)]
    if len(differ) > MOST_KEYS:
        lines.append(f"and {len(differ) - MOST_KEYS:,} keys more: --out page.html shows all")
    return "\n".join(lines)


def _read(run: RunDir, letter: str, name: str) -> Compared:
    records = read_metrics(run.metrics)
    evaluations = {str(one["split"]): one for one in read_evaluations(run)}
    if not records and not evaluations:
        raise UserError(
            "there is nothing to compare: neither metrics.jsonl nor an evaluation",
            where=str(run.path),
            remedy="Name run directories that `mf-scale train` wrote.",
        )
    facts = _facts(next((r for r in reversed(records) if r["event"] == "start"), {}))
    return Compared(letter, name, run_status(run), [*records], evaluations, {**_config(run), **facts})


def _config(run: RunDir) -> dict[str, str]:
    """config.yaml as it stands, so that runs of older programs can be compared too; {} without one."""
    if not run.config.is_file():
        return {}
    try:
        data = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"the configuration cannot be read: {error}", where=str(run.config)) from error
    return {key: value for key, value in _flat(data, "") if key not in _OWN}


def _facts(start: Record) -> dict[str, str]:
    """What the last start tells of program, libraries and ranks."""
    versions = start.get("versions")
    told = {"(ranks)": start.get("world"), "(micro_batch)": start.get("micro_batch")}
    told |= {f"({name})": version for name, version in versions.items()} if isinstance(versions, Mapping) else {}
    code = start.get("code")
    told |= (
        {f"(code {name})": code.get(name) for name in ("commit", "fingerprint")} if isinstance(code, Mapping) else {}
    )
    return {key: str(value) for key, value in told.items() if value is not None}


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, str(value)


def _short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last parts of each path, as many as tell them apart."""
    longest = max(map(len, paths))
    for parts in range(1, longest + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return ["/".join(path) for path in paths]


def _step(status: RunStatus) -> str:
    return f"{status.step:,}/{status.steps:,}" if status.steps else f"{status.step:,}"


def _loss_at(records: Sequence[Record], step: int) -> float | None:
    """The mean of the losses of the ten lines up to `step`, of which single ones say little."""
    losses = finite([r for r in records if r["event"] == "step" and r["step"] <= step], "loss")[1]
    return statistics.fmean(losses[-10:]) if losses else None


def _median(records: Sequence[Record], key: str) -> float | None:
    values = finite([r for r in records if r["event"] == "step"], key)[1]
    return statistics.median(values) if values else None


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4g}"


def _cut(text: str) -> str:
    """Of a long one the beginning and, since that is where paths differ, more of the end."""
    return text if len(text) <= _WIDEST else f"{text[:8]}…{text[9 - _WIDEST :]}"


def _grid(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """The rows in columns, the first `left` to the left; nothing in them can steer a terminal."""
    clean = [["".join(c if unicodedata.category(c)[0] != "C" else "?" for c in cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in clean
    ]
