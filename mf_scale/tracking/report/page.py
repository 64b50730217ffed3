"""The report of a run: one self-contained page, RUN/report/index.html, and its pictures as PNG files beside it.

Reads metrics.jsonl, what `evaluate` left in RUN/report (evaluation-SPLIT.json and the pictures it names), and what it
is handed: the counts of the training data, the files of hangs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mf_scale.errors import UserError
from mf_scale.rundir import RunDir, disk_errors, write_atomically
from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.pictures import write_bytes
from mf_scale.tracking.report.charts import Chart, draw
from mf_scale.tracking.report.classes import mean_of, measure_of
from mf_scale.tracking.report.curves import MEASURES, finite, layer_table, training_charts
from mf_scale.tracking.report.data import SourceCounts, class_images, data_view
from mf_scale.tracking.report.evaluations import read_evaluations
from mf_scale.tracking.report.html import render
from mf_scale.tracking.report.splits import metric_tables, split_view
from mf_scale.tracking.report.starts import lost_sentence, start_marks, start_table
from mf_scale.tracking.report.table import count, percent
from mf_scale.tracking.report.time import step_time
from mf_scale.tracking.report.wrong import Hang, read_troubles, wrong_tables
from mf_scale.tracking.status import RunStatus, run_status


def write_report(run: RunDir, sources: Sequence[SourceCounts] = (), hangs: Sequence[Hang] = ()) -> Path:
    """Write RUN/report/index.html and its PNG files; returns the page. UserError where there is nothing to report."""
    records = read_metrics(run.metrics)
    evaluations = read_evaluations(run)
    if not records and not evaluations:
        raise UserError(
            "there is nothing to report: neither metrics.jsonl nor an evaluation",
            where=str(run.path),
            remedy="Name a run directory that `mf-scale train` wrote.",
        )
    with disk_errors(run.report):
        run.report.mkdir(parents=True, exist_ok=True)
    status = run_status(run)
    marks = start_marks(status.starts)
    time, data = step_time(records, marks), data_view(sources)
    views = [split_view(run, e, class_images(sources, e["class_names"])) for e in evaluations]
    curves = training_charts(records, marks)
    values: dict[str, Any] = {
        "cards": headline(records, evaluations, status),
        "charts": drawn(run, curves),
        "marked": {mark.kind for chart in curves for mark in chart.marks},
        "layers": layer_table(records),
        "time": time,
        "time_charts": drawn(run, [time.chart] if time else []),
        "wrong": wrong_tables(read_troubles(run.metrics), hangs) if records or hangs else None,
        "starts": start_table(status.starts),
        "lost": lost_sentence(status),
        "metrics": metric_tables(evaluations),
        "splits": views,
        "data": data,
        "data_charts": drawn(run, data.charts if data else []),
        "config": run.config.read_text(encoding="utf-8", errors="replace") if run.config.is_file() else "",
    }
    page = render(
        "page.html",
        name=run.path.resolve().name,
        subtitle="Report of a MaskFormer run · mf_scale",
        sections=_sections(values),
        foot=_foot(records),
        **values,
    )
    index = run.report / "index.html"
    write_atomically(index, page)
    return index


def drawn(run: RunDir, charts: Sequence[Chart]) -> list[Markup]:
    """The charts for the page; each is a PNG file beside it too."""
    elements = []
    for chart in charts:
        svg, png = draw(chart)
        write_bytes(run.report / f"{chart.name}.png", png)
        elements.append(Markup(svg))
    return elements


def headline(
    records: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], status: RunStatus
) -> list[dict[str, str]]:
    """The numbers of the page's first screen: value and caption each."""
    cards = []
    first = {mean_of(measure_of(evaluation)) for evaluation in evaluations}
    for name in sorted(MEASURES, key=lambda name: name not in first):
        cards += [
            {"value": f"{percent(e[name])}%", "name": f"{name}, {e['split']}"}
            for e in evaluations
            if e.get(name) is not None
        ]
    steps = [r for r in records if r["event"] == "step"]
    speeds = finite(steps, "images_per_second")[1]
    losses = finite(steps, "loss")[1]
    if records:
        cards.append({"value": count(max(r["step"] for r in records)), "name": "steps"})
    if losses:
        cards.append({"value": f"{losses[-1]:.3g}", "name": "training loss, last"})
    if speeds:
        cards.append({"value": f"{statistics.median(speeds):.3g}", "name": "images/s, median"})
    if records:
        cards.append({"value": count(status.restarts), "name": "restarts"})
    if status.lost_steps:
        cards.append({"value": count(status.lost_steps), "name": "steps lost to restarts"})
    for event, name in (("skipped", "steps skipped"), ("quarantine", "samples quarantined")):
        number = sum(r["event"] == event for r in records)
        if number:
            cards.append({"value": count(number), "name": name})
    return cards


def _sections(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(place, title) of the sections that the page has."""
    wanted = [
        ("training", "Training", values["charts"]),
        ("time", "Time of a step", values["time"]),
        ("wrong", "What went wrong", values["wrong"] is not None),
        ("starts", "Starts", values["starts"]),
        ("metrics", "Metrics", True),
        *((f"classes-of-{s['place']}", f"Classes, {s['name']}", s["classes"]) for s in values["splits"]),
        *((f"pictures-of-{s['place']}", f"Pictures, {s['name']}", s["pictures"]) for s in values["splits"]),
        ("data", "Data", values["data"]),
        ("configuration", "Configuration", values["config"]),
    ]
    return [(place, title) for place, title, there in wanted if there]


def _foot(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line on the last event, one on the versions of the last start."""
    if not records:
        return []
    last = datetime.fromtimestamp(records[-1]["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"last event: {records[-1]['event']} at step {count(records[-1]['step'])}, {last}"]
    starts = [r for r in records if r["event"] == "start"]
    versions, code = (starts[-1].get(key) if starts else None for key in ("versions", "code"))
    if isinstance(code, dict):
        lines.append("code: " + " · ".join(f"{k} {v}" for k, v in code.items() if isinstance(v, str)))
    if isinstance(versions, dict):
        lines.append(" · ".join(f"{k} {v}" for k, v in versions.items()))
    return lines
