"""The curves of a run, from the lines of metrics.jsonl that still hold: whatever it has logged, and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mf_scale.tracking.report.charts import EVALUATION, Chart, Line, Mark
from mf_scale.tracking.report.table import Column, Table

Record = Mapping[str, Any]
_Some = TypeVar("_Some")
MEASURES = ("mIoU", "PQ", "AP")
"""What an evaluation is quoted by."""
LAYERS = "loss_layers"
_LOG_AXES = ("loss", "loss-terms", "loss-layers", "gradient-norm")
_LOSS_TERM = "loss_"
"""Prefix of the terms in a step's record: which there are is the loss's matter."""
MOST_LINES = 5000
"""Lines that layers and phases are taken from."""
_MOST_GROUPS = 8
_LATE = 0.1
"""Share of the lines, the last ones, over which the table of layers takes means."""


def training_charts(records: Sequence[Record], marks: Sequence[Mark] = ()) -> list[Chart]:
    """Losses, learning rate, gradient norm, speed, memory, matched segments; evaluations are marked beside `marks`."""
    steps = [r for r in records if r["event"] == "step"]
    validations = [r for r in records if r["event"] == "validation"]
    terms = [key for key in keys_of(steps) if key.startswith(_LOSS_TERM) and key != LAYERS]
    wanted = [
        ("loss", "Loss", "", [_line("training", steps, "loss"), _line("validation", validations, "loss", points=True)]),
        ("loss-terms", "Loss terms (weighted)", "", [_line(key.removeprefix(_LOSS_TERM), steps, key) for key in terms]),
        ("loss-layers", "Loss by decoder layer", "", _layer_lines(steps)),
        ("metrics", "Evaluations, %", "", _metric_lines(records)),
        ("learning-rate", "Learning rate", "", _group_lines(steps, "lr", "lrs")),
        ("gradient-norm", "Gradient norm before clipping", "", _group_lines(steps, "grad_norm", "grad_norms")),
        ("speed", "Speed", "images/s", [_line("images/s", steps, "images_per_second")]),
        ("memory", "Memory, the highest of all ranks", "GiB", _memory_lines(steps)),
        ("matched", "Matched segments of a step", "", [_line("matched", steps, "matched")]),
    ]
    marks = [*marks, *evaluation_marks(records)]
    charts = []
    for name, title, unit, lines in wanted:
        drawn = [line for line in lines if line.values]
        if drawn:
            charts.append(Chart(name, title, unit, drawn, marks, log=name in _LOG_AXES))
    return charts


def evaluation_marks(records: Sequence[Record]) -> list[Mark]:
    """A mark at every step at which the run was evaluated, with what came out."""
    marks = []
    for (step, split, samples), record in last_evaluations(records).items():
        values = ", ".join(f"{name} {100 * record[name]:.1f}" for name in MEASURES if number_in(record, name))
        text = f"evaluated on {samples:,} images of {split} after step {step:,}: {values or '-'}"
        marks.append(Mark(step, "", text, EVALUATION))
    return marks


def last_evaluations(records: Sequence[Record]) -> dict[tuple[int, str, int], Record]:
    """(step, split, images) -> its newest evaluation, by step. Those of other images are no points of one curve."""
    events = [r for r in records if r["event"] == "evaluation"]
    newest = {(int(r["step"]), str(r.get("split", "")), int(r.get("samples") or 0)): r for r in events}
    return dict(sorted(newest.items(), key=lambda item: item[0]))


def layer_table(records: Sequence[Record]) -> Table | None:
    """Terms of the loss by decoder layer, means over the end of the run; None where no line tells of layers."""
    told = [r[LAYERS] for r in records if r["event"] == "step" and isinstance(r.get(LAYERS), Mapping)]
    late = told[-max(1, round(len(told) * _LATE)) :]
    terms = [term for term in keys_of(late) if _layers(late[-1], term)]
    if not terms:
        return None
    layers = max(len(_layers(late[-1], term)) for term in terms)
    rows = [
        [name, *(f"{value:.4g}" if value is not None else "-" for value in values)]
        for name, values in [(term, [_mean_of(late, term, i) for i in range(layers)]) for term in terms]
    ]
    names = [Column(f"layer {i + 1}") for i in range(layers)]
    lines = "the last line" if len(late) == 1 else f"means of the last {len(late):,} lines"
    return Table("layers", f"Loss by decoder layer: {lines}", [Column("term", text=True), *names], rows)


def keys_of(records: Sequence[Record]) -> list[str]:
    """All keys, in the order of their first coming."""
    return list(dict.fromkeys(key for record in records for key in record))


def some_of(records: list[_Some]) -> list[_Some]:
    """Of very many records every so-manieth, the last one included: for what is many numbers a line."""
    return records[::-1][:: -(-len(records) // MOST_LINES) or 1][::-1]


def number_in(record: Record, key: str) -> bool:
    """Whether there is a number under `key` (null: it was not finite)."""
    return isinstance(record.get(key), int | float) and not isinstance(record.get(key), bool)


def finite(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a number under `key`."""
    pairs = [(int(r["step"]), float(r[key])) for r in records if number_in(r, key)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def metric_line(records: Sequence[Record], split: str, measure: str, name: str, samples: int | None = None) -> Line:
    """One measure of a split over the run, in percent, on `samples` images: None: as many as most evaluations took."""
    told = last_evaluations(records)
    taken = Counter(images for _, at, images in told if at == split)
    if samples is None:
        samples = max(taken, key=lambda images: (taken[images], images), default=0)
    steps, values = finite([r for (_, at, images), r in told.items() if (at, images) == (split, samples)], measure)
    return Line(name, steps, [100 * value for value in values], points=True)


def _metric_lines(records: Sequence[Record]) -> list[Line]:
    """Of what was evaluated at several steps; a single one is in the table."""
    kinds = sorted({(split, images) for _, split, images in last_evaluations(records)})
    splits = [split for split, _ in kinds]
    lines = []
    for split, images in kinds:
        of = f", {split}" if len(set(splits)) > 1 else ""
        of += f", {images:,} images" if splits.count(split) > 1 else ""
        lines += [metric_line(records, split, measure, f"{measure}{of}", images) for measure in MEASURES]
    return [line for line in lines if len(line.values) > 1]


def _memory_lines(steps: Sequence[Record]) -> list[Line]:
    told = [{"step": r["step"], **r["memory"]} for r in steps if isinstance(r.get("memory"), Mapping)]
    names = {"device_peak_gib": "device, peak", "host_rss_gib": "host, resident"}
    return [_line(name, told, key) for key, name in names.items()]


def _group_lines(steps: Sequence[Record], whole: str, by_group: str) -> list[Line]:
    """The value of all parameters, and those of their groups where they are others."""
    told = [{"step": r["step"], **r[by_group]} for r in steps if isinstance(r.get(by_group), Mapping)]
    everything = _line("all", steps, whole)
    lines = [everything, *(_line(name, told, name) for name in keys_of(told) if name != "step")]
    different = [line for i, line in enumerate(lines) if line.values not in [one.values for one in lines[:i]]]
    return different[:_MOST_GROUPS]


def _layer_lines(steps: Sequence[Record]) -> list[Line]:
    """The sum of the terms of each layer."""
    told = some_of([r for r in steps if isinstance(r.get(LAYERS), Mapping)])
    layers = max((len(_layers(r[LAYERS], term)) for r in told for term in r[LAYERS]), default=0)
    lines = []
    for i in range(layers):
        sums = [(r["step"], _sum_of(r[LAYERS], i)) for r in told]
        known = [(step, value) for step, value in sums if value is not None]
        lines.append(Line(f"layer {i + 1}", [step for step, _ in known], [value for _, value in known]))
    return lines


def _layers(told: Mapping[str, Any], term: str) -> list[Any]:
    values = told.get(term)
    return values if isinstance(values, list) else []


def _sum_of(told: Mapping[str, Any], layer: int) -> float | None:
    values = [row[layer] for term in told if layer < len(row := _layers(told, term))]
    return sum(values) if values and all(isinstance(v, int | float) for v in values) else None


def _mean_of(told: Sequence[Mapping[str, Any]], term: str, layer: int) -> float | None:
    values = [row[layer] for one in told if layer < len(row := _layers(one, term))]
    known = [float(value) for value in values if isinstance(value, int | float)]
    return sum(known) / len(known) if known else None


def _line(name: str, records: Sequence[Record], key: str, *, points: bool = False) -> Line:
    return Line(name, *finite(records, key), points=points and len(records) <= 60)
