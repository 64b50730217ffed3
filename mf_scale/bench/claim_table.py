"""The claim's runs as means, spreads and paired differences, and as tables of Markdown. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mf_scale.vocabulary import BANDS

NUMBERS = ("mIoU", "seen", *BANDS, "pixel_accuracy")
"""Of a split: seen is the mean over the evaluated classes that training images hold."""
_HEADS = ("all", "trained on", *BANDS, "pixel acc.")
_SPLITS = {"val": "Held-out images", "train": "Training images"}


def summarise(
    runs: Sequence[Mapping[str, Any]], rate: float, models: Mapping[str, Any], bands: Mapping[str, int]
) -> dict[str, Any]:
    """Everything, for JSON: the runs, and of those at `rate` mean, standard deviation over seeds and differences.

    A difference is that of a kind to the first of `models`, of the same seeds, with the standard error of its mean.
    """
    of_kind = {
        kind: {run["seed"]: run for run in runs if (run["kind"], run["rate"]) == (kind, rate)} for kind in models
    }
    base = of_kind[next(iter(models))]
    rows: dict[str, Any] = {}
    for kind, own in of_kind.items():
        rows[kind] = {"seeds": sorted(own)}
        for split in _SPLITS:
            rows[kind][split] = {name: _compared(own, base, split, name) for name in NUMBERS}
    return {"rate": rate, "bands": dict(bands), "models": dict(models), "rows": rows, "runs": list(runs)}


def _compared(own: Mapping[int, Any], base: Mapping[int, Any], split: str, name: str) -> dict[str, Any]:
    """Spread of a number over the seeds of a kind, and of its difference to the base kind, the same seeds' each."""
    values = {seed: value for seed, run in own.items() if (value := number(run, split, name)) is not None}
    bases = {seed: value for seed, run in base.items() if (value := number(run, split, name)) is not None}
    pairs = [value - bases[seed] for seed, value in values.items() if seed in bases]
    return {**spread(list(values.values())), "difference": None if own is base else spread(pairs)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and standard error of the mean; None where there are too few."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "n": len(values),
        "mean": statistics.fmean(values) if values else None,
        "deviation": deviation,
        "error": None if deviation is None else deviation / math.sqrt(len(values)),
    }


def number(run: Mapping[str, Any], split: str, name: str) -> float | None:
    """One number of a run's split; None where no class has it."""
    value = run[split].get(name)
    return value["mIoU"] if isinstance(value, Mapping) else value


def claim_table(summary: Mapping[str, Any]) -> str:
    """Markdown, in percent: models, both splits with differences, and learning rates where several were tried."""
    rows, bands = summary["rows"], summary["bands"]
    texts = [_models(summary)]
    for split, title in _SPLITS.items():
        body = [[_name(kind, row), *_cells(row[split], _mean)] for kind, row in rows.items()]
        body += [
            [f"{kind} - {next(iter(rows))}", *_cells(row[split], _difference)]
            for kind, row in rows.items()
            if row[split]["mIoU"]["difference"] is not None
        ]
        texts.append(f"{title}, mIoU in percent:\n\n{markdown([title.lower(), *_HEADS], body)}")
    texts.append(
        "Mean ± standard deviation over seeds; a difference is taken seed by seed, ± the standard error of its mean.\n"
        f"Bands by training images of a class: rare 1 to {bands['rare']}, common to {bands['common']}, else frequent.\n"
        f"{_classes(summary)}".rstrip()
    )
    rates = sorted({run["rate"] for run in summary["runs"]})
    if len(rates) > 1:
        texts.append(_rates(summary, rates))
    return "\n\n".join(texts)


def _models(summary: Mapping[str, Any]) -> str:
    body = []
    for kind, model in summary["models"].items():
        own = [run for run in summary["runs"] if (run["kind"], run["rate"]) == (kind, summary["rate"])]
        seconds = statistics.median([run["step_seconds"] for run in own]) if own else None
        losses = spread([run["loss"] for run in own])
        body.append(
            [
                kind,
                f"{model['parameters'] / 1e6:.2f}",
                f"{model['gflop']:.2f}",
                "-" if seconds is None else f"{seconds:.2f}",
                _with(losses["mean"], losses["deviation"], ".2f"),
            ]
        )
    return markdown(["model", "M parameters", "GFLOP forward", "s a step", "last loss"], body)


def _classes(summary: Mapping[str, Any]) -> str:
    """How many classes a mean is over, of the runs of the first kind."""
    kind = next(iter(summary["models"]))
    runs = [run for run in summary["runs"] if (run["kind"], run["rate"]) == (kind, summary["rate"])]
    told = []
    for split, title in _SPLITS.items() if runs else ():
        columns: list[Callable[[Mapping[str, Any]], int]] = [
            lambda part: part["classes"],
            lambda part: part["seen_classes"],
        ]
        columns += [lambda part, band=band: part[band]["classes"] for band in BANDS]  # type: ignore[misc]
        told.append(f"{title.lower()} {', '.join(_range([of(run[split]) for run in runs]) for of in columns)}")
    listed = ";\n".join(told)
    return f"Classes that a mean is over, by column: {listed}." if told else ""


def _rates(summary: Mapping[str, Any], rates: Sequence[float]) -> str:
    tried = {run["rate"]: run["seed"] for run in summary["runs"] if run["rate"] != summary["rate"]}
    seed = next(iter(tried.values()))
    body = []
    for kind in summary["models"]:
        for split, title in _SPLITS.items():
            found = {r["rate"]: r[split]["mIoU"] for r in summary["runs"] if (r["kind"], r["seed"]) == (kind, seed)}
            cells = [_with(100 * found[rate], None, ".2f") if rate in found else "-" for rate in rates]
            body.append([kind, title.lower(), *cells])
    table = markdown(["model", "images", *(f"lr {rate:g}" for rate in rates)], body)
    return f"Learning rates, seed {seed}, mIoU of all classes in percent:\n\n{table}"


def _name(kind: str, row: Mapping[str, Any]) -> str:
    seeds = len(row["seeds"])
    return f"{kind} ({seeds} seed{'' if seeds == 1 else 's'})"


def _cells(part: Mapping[str, Any], cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
    return [cell(part[name]) for name in NUMBERS]


def _mean(value: Mapping[str, Any]) -> str:
    return _percent(value["mean"], value["deviation"])


def _difference(value: Mapping[str, Any]) -> str:
    return _percent(value["difference"]["mean"], value["difference"]["error"], "+")


def _percent(value: float | None, spread: float | None, sign: str = "") -> str:
    return _with(None if value is None else 100 * value, None if spread is None else 100 * spread, f"{sign}.2f")


def _with(value: float | None, spread: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) + ("" if spread is None else f" ± {spread:.2f}")


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of Markdown whose columns stand under each other."""
    lines = [list(heads), *(list(row) for row in body)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [lines[0], rule, *lines[1:]]
    )
