"""The report of a run: one self-contained page, RUN/report/index.html, and its pictures as PNG files beside it.

Reads metrics.jsonl and what `evaluate` left in RUN/report: evaluation-SPLIT.json and the pictures it names.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mf_scale.errors import UserError
from mf_scale.rundir import RunDir, read_json, write_atomically
from mf_scale.tracking.charts import Chart, Line, Mark, draw, draw_bars
from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.pictures import class_color, embedded, read_png, sheet, write_bytes, write_png
from mf_scale.tracking.report_starts import lost_sentence, start_marks, start_rows
from mf_scale.tracking.status import RunStatus, run_status

MOST_BARS = 40
"""Classes that all get a bar; of more only the best and the worst, and a table holds the rest."""
_LOG_AXES = ("loss", "loss-terms", "gradient-norm")
_LOSS_TERM = "loss_"
"""Prefix of the terms in a step's record: which there are is the loss's matter."""


def write_report(run: RunDir) -> Path:
    """Write RUN/report/index.html and its PNG files; returns the page. UserError where there is nothing to report."""
    records = read_metrics(run.metrics)
    evaluations = [read_json(file) for file in sorted(run.report.glob("evaluation-*.json"))]
    if not records and not evaluations:
        raise UserError(
            "there is nothing to report: neither metrics.jsonl nor an evaluation",
            where=str(run.path),
            remedy="Name a run directory that `mf-scale train` wrote.",
        )
    run.report.mkdir(parents=True, exist_ok=True)
    charts = []
    status = run_status(run)
    for chart in training_charts(records, start_marks(status.starts)):
        svg, png = draw(chart)
        write_bytes(run.report / f"{chart.name}.png", png)
        charts.append(Markup(svg))
    splits = [_split(run, evaluation) for evaluation in evaluations]
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": _percent, "count": _count}
    page = environment.from_string(template).render(
        name=run.path.resolve().name,
        cards=headline(records, evaluations, status),
        charts=charts,
        starts=start_rows(status.starts),
        lost=lost_sentence(status),
        splits=splits,
        has_panoptic=any(split["panoptic"] for split in splits),
        has_semantic=any(split["semantic"] for split in splits),
        config=run.config.read_text(encoding="utf-8") if run.config.is_file() else "",
        foot=_foot(records),
    )
    index = run.report / "index.html"
    write_atomically(index, page)
    return index


def headline(
    records: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], status: RunStatus
) -> list[dict[str, str]]:
    """The numbers of the page's first screen: value and caption each."""
    cards = []
    for name in ("mIoU", "PQ"):
        cards += [
            {"value": f"{_percent(e[name])}%", "name": f"{name}, {e['split']}"}
            for e in evaluations
            if e.get(name) is not None
        ]
    steps = [r for r in records if r["event"] == "step"]
    speeds = _finite(steps, "images_per_second")[1]
    losses = _finite(steps, "loss")[1]
    if records:
        cards.append({"value": _count(max(r["step"] for r in records)), "name": "steps"})
    if losses:
        cards.append({"value": f"{losses[-1]:.3g}", "name": "training loss, last"})
    if speeds:
        cards.append({"value": f"{statistics.median(speeds):.3g}", "name": "images/s, median"})
    if records:
        cards.append({"value": _count(status.restarts), "name": "restarts"})
    if status.lost_steps:
        cards.append({"value": _count(status.lost_steps), "name": "steps lost to restarts"})
    for event, name in (("skipped", "steps skipped"), ("quarantine", "samples quarantined")):
        count = sum(r["event"] == event for r in records)
        if count:
            cards.append({"value": _count(count), "name": name})
    return cards


def training_charts(records: Sequence[dict[str, Any]], marks: Sequence[Mark] = ()) -> list[Chart]:
    """Curves of whatever the run has logged: losses, learning rate, gradient norm, speed, waiting for data."""
    steps = [r for r in records if r["event"] == "step"]
    validations = [r for r in records if r["event"] == "validation"]
    terms = list(dict.fromkeys(key for record in steps for key in record if key.startswith(_LOSS_TERM)))
    wanted = [
        ("loss", "Loss", "", [_line("training", steps, "loss"), _line("validation", validations, "loss", points=True)]),
        ("loss-terms", "Loss terms (weighted)", "", [_line(key.removeprefix(_LOSS_TERM), steps, key) for key in terms]),
        ("learning-rate", "Learning rate", "", [_line("learning rate", steps, "lr", points=True)]),
        ("gradient-norm", "Gradient norm before clipping", "", [_line("gradient norm", steps, "grad_norm")]),
        ("speed", "Speed", "images/s", [_line("images/s", steps, "images_per_second")]),
        (
            "step-time",
            "Time of a step",
            "s",
            [_line("step", steps, "step_time"), _line("data wait", steps, "data_wait")],
        ),
    ]
    charts = []
    for name, title, unit, lines in wanted:
        drawn = [line for line in lines if line.values]
        if drawn:
            charts.append(Chart(name, title, unit, drawn, marks, log=name in _LOG_AXES))
    return charts


def _line(name: str, records: Sequence[dict[str, Any]], key: str, *, points: bool = False) -> Line:
    return Line(name, *_finite(records, key), points=points and len(records) <= 60)


def _finite(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a number under `key` (null: it was not finite)."""
    pairs = [(r["step"], float(r[key])) for r in records if isinstance(r.get(key), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _split(run: RunDir, evaluation: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one evaluated split; writes its bar chart."""
    classes = _classes(evaluation)
    ranked = sorted(classes, key=lambda c: (-c["value"], c["share"] or 0))  # of equals the rarer is the better
    cut = len(ranked) > MOST_BARS
    half = MOST_BARS // 2
    groups = [("best", ranked[:half]), ("worst", ranked[-half:])] if cut else [("", ranked)]
    measure = "IoU" if evaluation.get("semantic") else "PQ"
    if ranked:
        shown = [c for _, group in groups for c in group]
        title = f"{measure} by class, {evaluation['split']}" + (
            f": best and worst {half} of {len(ranked)}" if cut else ""
        )
        bars = draw_bars([c["name"] for c in shown], [c["value"] for c in shown], title)
        write_bytes(run.report / f"classes-{evaluation['split']}.png", bars)
    _write_sheet(run, evaluation)
    return {
        "name": evaluation["split"],
        "samples": evaluation["samples"],
        "step": evaluation["step"],
        "semantic": evaluation.get("semantic"),
        "panoptic": evaluation.get("panoptic"),
        "measure": measure,
        "groups": [{"name": name, "classes": group} for name, group in groups],
        "cut": cut,
        "classes": ranked,
        "pictures": [
            {
                "key": picture["key"],
                "views": [
                    {"title": view["title"], "data": embedded(run.report / Path(view["file"]).name)}
                    for view in picture["views"]
                ],
            }
            for picture in evaluation["pictures"]
        ],
    }


def _write_sheet(run: RunDir, evaluation: dict[str, Any]) -> None:
    """All pictures of the split in one PNG file."""
    pictures = evaluation["pictures"]
    if pictures:
        rows = [[read_png(run.report / Path(v["file"]).name) for v in p["views"]] for p in pictures]
        titles = [v["title"] for v in pictures[0]["views"]]
        write_png(run.report / f"samples-{evaluation['split']}.png", sheet(rows, titles))


def _classes(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The classes that occur in the split with their values; "value" is what bars show."""
    semantic, panoptic = (evaluation.get(k) or {} for k in ("semantic", "panoptic"))
    iou, pq = semantic.get("per_class", {}), panoptic.get("per_class", {})
    pixels = iou.get("pixels") or []
    rows = []
    for label, name in enumerate(evaluation["class_names"]):
        row = {"IoU": iou["IoU"][label] if iou else None} | {
            k: pq[k][label] if pq else None for k in ("PQ", "SQ", "RQ")
        }
        value = row["IoU"] if iou else row["PQ"]
        if value is None:
            continue
        row["share"] = pixels[label] / max(1, sum(pixels)) if pixels else None
        color = "#{:02x}{:02x}{:02x}".format(*class_color(label))
        rows.append({"name": name, "thing": evaluation["things"][label], "color": color, "value": value, **row})
    return rows


def _foot(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line on the last event, one on the versions of the last start."""
    if not records:
        return []
    last = datetime.fromtimestamp(records[-1]["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"last event: {records[-1]['event']} at step {_count(records[-1]['step'])}, {last}"]
    starts = [r for r in records if r["event"] == "start"]
    versions = starts[-1].get("versions") if starts else None
    if isinstance(versions, dict):
        lines.append(" · ".join(f"{k} {v}" for k, v in versions.items()))
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _count(value: float) -> str:
    return f"{value:,}".replace(",", "\u2009")
