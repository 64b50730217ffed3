"""The parts of the report page: curves and marks, time of a step, classes, troubles, data, tables."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.report.charts import (
    EVALUATION,
    MOST_NAMES,
    MOST_POINTS,
    MOST_TEXTS,
    ROLLBACK,
    Chart,
    Line,
    Mark,
    draw,
)
from mf_scale.tracking.report.classes import band_table, class_rows, class_tables, measure_of
from mf_scale.tracking.report.curves import layer_table, metric_line, training_charts
from mf_scale.tracking.report.data import SourceCounts, class_images, data_view
from mf_scale.tracking.report.starts import start_marks
from mf_scale.tracking.report.table import Cell, Column, Table, table_html
from mf_scale.tracking.report.time import step_time
from mf_scale.tracking.report.wrong import TAKEN_BACK, Hang, read_hangs, read_troubles, wrong_tables
from mf_scale.tracking.status import run_status
from tests.unit.histories import Maker
from tests.unit.report_runs import EVIL, PHASES, counted, troubled_run


def _texts(table: Table) -> list[list[str]]:
    return [[cell if isinstance(cell, str) else cell.text for cell in row] for row in table.rows]


def test_charts_show_what_was_logged_and_the_marks() -> None:
    records: list[dict[str, Any]] = [{"event": "step", "step": i, "loss": 1.0 if i % 2 else None} for i in range(10)]
    records += [{"event": "validation", "step": 9, "loss": 2.0}]
    records += [
        {"event": "evaluation", "step": 9, "split": "val", "samples": 5, "mIoU": m, "PQ": None} for m in (0.2, 0.25)
    ]
    marks = [Mark(4, "2", "resumed")]
    (chart,) = training_charts(records, marks)
    assert [line.name for line in chart.lines] == ["training", "validation"]
    assert chart.lines[0].steps == [1, 3, 5, 7, 9], "a loss that was not finite is null and is left out"
    assert [mark.kind for mark in chart.marks] == ["resumed", EVALUATION]
    assert chart.marks[1].text == "evaluated on 5 images of val after step 9: mIoU 25.0", "the newest"


def test_evaluations_of_several_steps_are_a_curve(tmp_path: Path) -> None:
    charts = {c.name: c for c in training_charts(read_metrics(troubled_run(tmp_path / "run").metrics))}
    lines = {line.name: line for line in charts["metrics"].lines}
    assert lines["mIoU"].steps == [125, 250, 500]
    assert [round(v) for v in lines["PQ"].values] == [12, 22, 30]
    assert [line.name for line in charts["memory"].lines] == ["device, peak", "host, resident"]


def test_evaluations_of_other_images_are_another_curve() -> None:
    told = [(10, 6, 0.1), (20, 6, 0.2), (20, 13, 0.05), (30, 6, 0.3)]
    records = [{"event": "evaluation", "step": s, "split": "val", "samples": n, "mIoU": m} for s, n, m in told]
    (chart,) = training_charts(records)
    lines = {line.name: line.steps for line in chart.lines}
    assert lines == {"mIoU, 6 images": [10, 20, 30]}, "a single one is in the table"
    assert metric_line(records, "val", "mIoU", "A").steps == [10, 20, 30]


def test_groups_of_parameters_have_lines_where_they_differ() -> None:
    lrs = {"backbone": 0.1, "rest": 0.3, "rest/no_decay": 0.3}
    (chart,) = training_charts([{"event": "step", "step": 1, "lr": 0.3, "lrs": lrs}])
    assert [(line.name, line.values) for line in chart.lines] == [("all", [0.3]), ("backbone", [0.1])]


def test_restarts_and_rollbacks_are_different_marks(tmp_path: Path) -> None:
    marks = start_marks(run_status(troubled_run(tmp_path / "run")).starts)
    assert [(mark.step, mark.kind) for mark in marks] == [(125, "resumed"), (250, ROLLBACK)]
    svg, _ = draw(Chart("x", "t", "", [Line("a", [0, 300], [1.0, 2.0])], marks))
    assert "the loss of step 290 jumped; 40 steps lost" in svg


def test_layers_are_summed_over_terms(tmp_path: Path) -> None:
    layers = {"class": [3.0, 1.0], "dice": [2.0, None]}
    records = [{"event": "step", "step": step, "loss_layers": layers, "loss_class": 4.0} for step in range(1, 30)]
    charts = {chart.name: chart for chart in training_charts(records)}
    first, second = charts["loss-layers"].lines[0], charts["loss-layers"].lines[1:]
    assert first.name == "layer 1" and set(first.values) == {5.0}
    assert second == [], "a term that was not finite leaves its layer out"
    assert [line.name for line in charts["loss-terms"].lines] == ["class"], "layers are no term"
    table = layer_table(records)
    assert table is not None and _texts(table) == [["class", "3", "1"], ["dice", "2", "-"]]
    assert layer_table([{"event": "step", "step": 1}]) is None


def test_phases_are_weighed_by_the_steps_of_their_line() -> None:
    def line(step: int, data: float) -> dict[str, Any]:
        return {"event": "step", "step": step, "phases": {"data": data, "other": 1.0}, "step_time": 1 + data}

    told = step_time([line(10, 0.0), line(40, 1.0)], [])
    assert told is not None and told.told
    assert told.shares[0][1] == pytest.approx(0.75 / 1.75)
    assert _texts(told.table)[0][:3] == ["data", "42.9", "750"]
    assert _texts(told.table)[-1][1] == "100.0"
    assert told.chart.stacked and [one.name for one in told.chart.lines] == ["data", "other"]


def test_older_lines_tell_data_and_all_else() -> None:
    old = {"event": "step", "step": 1, "step_time": 0.5, "data_wait": 0.125}
    told = step_time([old], [])
    assert told is not None and not told.told
    assert _texts(told.table)[:2] == [["data", "25.0", "125", "125"], ["all else", "75.0", "375", "375"]]
    newer = {"event": "step", "step": 2, "phases": PHASES}
    told = step_time([old, newer], [])
    assert told is not None and [one.name for one in told.chart.lines] == list(PHASES), "one kind at a time"
    assert step_time([{"event": "step", "step": 1, "loss": 1.0}], []) is None


def _evaluation(**values: Any) -> dict[str, Any]:
    iou, pixels = [0.0, 0.9, None, 0.0], [5, 5, 0, 90]
    semantic = {"mIoU": 0.3, "per_class": {"IoU": iou, "pixels": pixels}}
    return {"class_names": ["small", "good", "absent", "large"], "things": [True] * 4, "semantic": semantic, **values}


def test_classes_are_ranked_by_what_they_cost() -> None:
    confusions = [{"truth": 3, "predicted": 1, "pixels": 60, "share": 0.6667}]
    rows = class_rows(_evaluation(confusions=confusions), [1, 2, 3, 4])
    assert [row.name for row in rows] == ["large", "small", "good"], "of equals the one with most pixels first"
    assert rows[0].lost == pytest.approx(1 / 3) and rows[2].lost == pytest.approx(0.1 / 3)
    assert sum(row.lost for row in rows) == pytest.approx(1 - 0.3), "together what is missing"
    assert rows[0].taken_for == "good 67%" and rows[0].share == pytest.approx(0.9) and rows[0].images == 4
    shown, folded = class_tables(rows, "IoU", "x")
    assert folded == [] and _texts(shown[0])[0] == ["large", "thing", "0.0", "33.33", "90.00", "4", "good 67%"]


def test_bands_tell_what_they_cost() -> None:
    bands = {"of_class": ["rare", "frequent", None, "rare"], "rare": {"classes": 2, "mIoU": 0.0, "PQ": None}}
    evaluation = _evaluation(bands={**bands, "frequent": {"classes": 1, "mIoU": 0.9}})
    table = band_table(evaluation, class_rows(evaluation), "x")
    assert table is not None
    assert _texts(table) == [["rare", "2 of 2", "0.0", "66.67"], ["frequent", "1 of 1", "90.0", "3.33"]]


def test_the_measure_is_that_of_the_task() -> None:
    assert measure_of(_evaluation()) == "IoU"
    assert measure_of({"panoptic": {"a": 1}, "instances": {"b": 1}}) == "PQ"
    assert measure_of({"instances": {"b": 1}}) == "AP"
    assert measure_of({"task": "panoptic", "panoptic": {"a": 1}, "instances": {"b": 1}}) == "PQ"


def test_troubles_of_steps_that_were_taken_back_are_told_once(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "run")
    maker.begun(0)
    maker.line("quarantine", 5, source="s", shard="a.tar", key="k", reason="cut short")
    maker.line("skipped", 6, reason="loss", ranks=[{"rank": 1, "terms": ["dice"], "keys": ["x"]}])
    maker.line("straggler", 2, rank=3, host="n", phase="data", seconds=0.5, median=0.1)
    maker.begun(4)
    maker.line("quarantine", 5, source="s", shard="a.tar", key="k", reason="cut short")
    with maker.run.metrics.open("a") as file:
        file.write(json.dumps({"event": "skipped", "step": 9, "time": 1.0, "start": 1}) + "\n")  # a survivor's
    told = read_troubles(maker.run.metrics)
    assert [(t["event"], t["step"], t[TAKEN_BACK]) for t in told] == [
        ("skipped", 6, True),
        ("straggler", 2, False),
        ("quarantine", 5, False),
    ]
    assert read_troubles(tmp_path / "none") == []


def test_every_trouble_has_its_table(tmp_path: Path) -> None:
    run = troubled_run(tmp_path / "run")
    tables = {table.id: table for table in wrong_tables(read_troubles(run.metrics))}
    assert list(tables) == [
        "stragglers",
        "skipped",
        "quarantine",
        "rollbacks",
        "failed-saves",
        "slow-saves",
        "failed-evaluations",
    ]
    assert _texts(tables["stragglers"])[0] == ["rank 17", "data", "2", "412", "21", "300", "253 to 259"]
    assert _texts(tables["skipped"])[0][1:3] == ["loss: dice", "3"]
    assert tables["skipped"].rows[0][0].small == "taken back later"  # type: ignore[union-attr]
    assert _texts(tables["rollbacks"]) == [["loss of step 290", "250", "10"]]
    assert _texts(tables["slow-saves"])[0] == ["step 250", "15\u00a0min\u00a000\u00a0s", "1, 2, 3, 4 and 2 more"]


def test_hangs_are_read_by_start(tmp_path: Path) -> None:
    for name, text in (("start-2-rank-10-of-16.txt", "rank 10 hangs: x\nmore"), ("start-2-rank-9-of-16.txt", "rank 9"),
                       ("notes.txt", "no"), ("start-1-rank-0-of-16.txt", "")):  # fmt: skip
        (tmp_path / name).write_text(text)
    hangs = read_hangs(tmp_path)
    assert [(hang.of, hang.rank) for hang in hangs] == [("start-1", 0), ("start-2", 9), ("start-2", 10)]
    assert hangs[2] == Hang("start-2", 10, 16, "rank 10 hangs: x")
    (table,) = wrong_tables([], hangs)
    assert _texts(table)[1] == ["start 2", "9, 10 of 16", "rank 9"]


def test_data_is_summed_over_sources() -> None:
    sources = counted(6)
    view = data_view(sources)
    assert view is not None and [table.id for table in view.tables] == ["sources", "class-images", "sizes"]
    assert class_images(sources, sources[0].class_names) == [2 * n for n in sources[0].class_images]
    assert class_images(sources, ["another"] * 6) is None, "other labels, other classes"
    assert [row[-1] for row in _texts(view.tables[0])] == ["25", "75"]
    assert _texts(view.tables[2])[0] == ["640 x 480", "18\u202f000", "68.8"]
    assert [chart.name for chart in view.charts] == ["data-classes", "data-segments", "data-sizes"]
    gone = SourceCounts("a", missing="no index")
    assert class_images([*sources, gone], sources[0].class_names) is None
    view = data_view([gone])
    assert view is not None and view.missing == ["a: no index"] and view.tables == []
    assert data_view([]) is None


def test_a_table_escapes_cells_and_the_names_of_its_columns() -> None:
    columns = [Column("a"), Column(f'b"}}{EVIL}'), Column("c", about='"q"')]
    html = table_html(Table("t", EVIL, columns, [[EVIL, Cell(EVIL, small=EVIL, color='"><b>'), "x"]]))
    assert "<script" not in html and "<b>" not in html
    style = html[: html.index("</style>")]
    assert style.count('"') == 4 and EVIL not in style, "the names of columns stay inside their strings"
    assert 'title="&#34;q&#34;"' in html


def test_a_chart_is_sound_svg_in_the_pages_colours() -> None:
    steps = list(range(5000))
    lines = [Line("a", steps, [1.0 + s for s in steps]), Line("_$b$", steps[:3], [1.0, 3.0, 2.0], points=True)]
    svg, png = draw(Chart("x", "A <chart>", "s", lines, [Mark(100, "2", "after <this>")], log=True))
    ET.fromstring(svg)
    assert "var(--series-0)" in svg and "var(--ink)" in svg and "#2f6fde" not in svg
    assert "<title>after &lt;this&gt;</title>" in svg and ">2</text>" in svg
    assert "http" not in svg and " _$b$</text>" in svg and "mathdefault" not in svg
    assert 'aria-label="A &lt;chart&gt; in s by step: a from 1 to 5000;' in svg
    assert png.startswith(b"\x89PNG")
    longest = max(len(path) for path in re.findall(r'd="([^"]*)"', svg))
    assert longest < MOST_POINTS * 40


def test_two_charts_of_a_page_share_no_id() -> None:
    ids = []
    for name in ("x", "y"):
        svg, _ = draw(Chart(name, "t", "", [Line("a", [0, 20], [1.0, 2.0], points=True)], [Mark(3, "2", "w")]))
        ids.append(set(re.findall(r'\sid="([^"]*)"', svg)))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) == ids[-1], "only what is needed"
    assert not ids[0] & ids[1]


def test_many_marks_keep_their_texts_and_lose_their_names() -> None:
    marks = [Mark(step, f"start {step}", f"text of {step}") for step in range(MOST_NAMES + 1)]
    svg, _ = draw(Chart("x", "t", "", [Line("a", [0, 20], [1.0, 2.0])], marks))
    assert svg.count("<title>text of ") == len(marks) and "start 3" not in svg
    svg, _ = draw(Chart("x", "t", "", [Line("a", [0, 20], [1.0, 2.0])], marks[:-1]))
    assert "start 3" in svg


def test_crowds_of_marks_are_drawn_at_once() -> None:
    marks = [Mark(step, "n", "text", EVALUATION) for step in range(MOST_TEXTS + 1)] + [Mark(3, "2", "another")]
    svg, _ = draw(Chart("x", "t", "", [Line("a", [0, 99], [1.0, 2.0])], marks))
    assert svg.count("<title>") == 1 and len(svg) < 40_000


def test_a_stack_and_a_line_without_values_are_drawn() -> None:
    lines = [Line("a", [1, 2, 3], [1.0, 2.0, 3.0]), Line("b", [1, 2, 3], [1.0, 1.0, 1.0])]
    svg, _ = draw(Chart("x", "t", "ms", lines, stacked=True))
    assert "var(--series-1)" in svg
    svg, _ = draw(Chart("x", "t", "", [Line("a", [], []), lines[1]]))
    assert "var(--series-1)" in svg and "var(--series-0)" not in svg, "a run keeps its colour"
