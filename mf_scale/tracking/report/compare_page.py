"""The page that puts runs side by side: overlaid curves, what differs, classes by what they gained or lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mf_scale.errors import UserError
from mf_scale.rundir import write_atomically
from mf_scale.tracking.report.chart_svg import SERIES
from mf_scale.tracking.report.charts import Chart, Line, draw_svg
from mf_scale.tracking.report.classes import class_values, measure_of
from mf_scale.tracking.report.compare import Compared, differences, numbers
from mf_scale.tracking.report.curves import MEASURES, finite, metric_line
from mf_scale.tracking.report.html import render
from mf_scale.tracking.report.table import Cell, Column, Table, count, percent

SHOWN = 20
"""Classes that differ most which are shown; the others are folded."""


def refuse_page(page: Path) -> None:
    """UserError where no page can be written, or what stands there is by its name something else than a page."""
    if page.is_dir():
        raise UserError("the page is a folder", where=str(page), remedy="Name a file: --out page.html")
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError("this is no name of a page", where=str(page), remedy="Name a file that ends with .html.")
    if not page.parent.is_dir():
        raise UserError("the folder of the page does not exist", where=str(page), remedy="Make it, or name another.")


def write_comparison(runs: Sequence[Compared], page: Path) -> Path:
    """Write the page, in place of an older one; UserError as of `refuse_page`, and where it cannot be written."""
    refuse_page(page)
    told, splits = numbers(runs), _shared_splits(runs)
    rows: list[list[Cell | str]] = [[Cell(name, color=_color(i)), *cells] for i, (name, *cells) in enumerate(told.rows)]
    differ = differences(runs)
    tables = [_class_tables(runs, split, place) for place, split in enumerate(splits)]
    values: dict[str, Any] = {
        "numbers": Table("numbers", "Numbers", _heads(told.heads), rows),
        "runs": [(_color(i), f"{run.letter} {run.name}") for i, run in enumerate(runs)],
        "charts": [Markup(draw_svg(chart)) for chart in comparison_charts(runs)],
        "differ": _difference_table(runs, differ) if differ else None,
        "classes": [one for one in tables if one is not None],
    }
    wanted = [
        ("numbers-of-runs", "Numbers", True),
        ("curves", "Curves", values["charts"]),
        ("settings", "What differs", True),
        ("classes", "Classes", values["classes"]),
    ]
    text = render(
        "compare.html",
        name=f"{len(runs)} runs side by side",
        subtitle=", ".join(f"{run.letter} {run.name}" for run in runs),
        sections=[(place, title) for place, title, there in wanted if there],
        foot=["Losses are smoothed; evaluations are as they were logged."],
        **values,
    )
    write_atomically(page, text)
    return page


def comparison_charts(runs: Sequence[Compared]) -> list[Chart]:
    """One chart a quantity, one line a run; a run's colour is the same in all. Runs that lack it have an empty line."""
    wanted = [
        ("loss", "Loss", "", "step", "loss"),
        ("validation", "Validation loss", "", "validation", "loss"),
        ("learning-rate", "Learning rate", "", "step", "lr"),
        ("gradient-norm", "Gradient norm before clipping", "", "step", "grad_norm"),
        ("speed", "Speed", "images/s", "step", "images_per_second"),
        ("step-time", "Time of a step", "s", "step", "step_time"),
    ]
    charts = []
    for name, title, unit, event, key in wanted:
        lines = [
            Line(run.letter, *finite([r for r in run.records if r["event"] == event], key), points=event != "step")
            for run in runs
        ]
        charts.append(Chart(name, title, unit, lines, log=name in ("loss", "gradient-norm")))
    for split in sorted({split for run in runs for split in run.evaluations}):
        for measure in MEASURES:
            lines = [metric_line(run.records, split, measure, run.letter) for run in runs]
            if any(len(line.values) > 1 for line in lines):  # a single one is in the table
                charts.append(Chart(f"{measure}-{split}", f"{measure}, {split}, %", "", lines))
    return [chart for chart in charts if any(line.values for line in chart.lines)]


def _class_tables(runs: Sequence[Compared], split: str, place: int) -> dict[str, Any] | None:
    """The classes of a split that several runs were evaluated on, by how much their values differ; matched by name."""
    measure = next(measure_of(run.evaluations[split]) for run in runs if split in run.evaluations)
    members = [(i, run) for i, run in enumerate(runs) if measure in class_values(run.evaluations.get(split, {}))]
    if len(members) < 2:
        return None
    values = [_by_name(run.evaluations[split], measure) for _, run in members]
    names = [name for name in values[0] if any(name in other for other in values[1:])]
    spreads = {name: _spread([one.get(name) for one in values]) for name in names}
    ranked = sorted((name for name in names if spreads[name]), key=lambda name: -abs(spreads[name]))
    if not ranked:
        nothing = {"better": "", "shown": None, "folded": None}
        return {"split": split, "measure": measure, "compared": len(names), **nothing}
    last, sign = ("difference", "+") if len(members) == 2 else ("spread", "")
    columns = [
        Column("class", text=True),
        *(Column(f"{measure} {run.letter}") for _, run in members),
        Column(last, about="points: the last less the first of two, else the best less the worst"),
    ]

    def table(kind: str, caption: str, chosen: Sequence[str], *, tools: bool = False) -> Table:
        rows: list[list[Cell | str]] = [
            [name, *(percent(one.get(name)) for one in values), f"{100 * spreads[name]:{sign}.1f}"] for name in chosen
        ]
        return Table(f"{kind}-{place}", caption, columns, rows, tools=tools)

    up = sum(spread > 0 for spread in spreads.values())
    down = sum(spread < 0 for spread in spreads.values())
    better = (
        f"{count(up)} classes are better in {members[-1][1].letter}, {count(down)} worse" if len(members) == 2 else ""
    )
    several = len(ranked) > SHOWN
    caption = f"The {SHOWN} classes that differ most" if several else "Classes that differ"
    return {
        "split": split,
        "measure": measure,
        "compared": len(names),
        "better": better,
        "shown": table("differing", caption, ranked[:SHOWN], tools=not several),
        "folded": table("all", f"All {count(len(ranked))} classes that differ", ranked, tools=True)
        if several
        else None,
    }


def _by_name(evaluation: Mapping[str, Any], measure: str) -> dict[str, float]:
    """Class name -> value, of the names that stand once."""
    names = [str(name) for name in evaluation["class_names"]]
    counts = Counter(names)
    pairs = zip(names, class_values(evaluation)[measure], strict=True)
    return {name: value for name, value in pairs if value is not None and counts[name] == 1}


def _spread(values: Sequence[float | None]) -> float:
    """Of two the second less the first; of more the widest difference. 0 where fewer than two are known."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return 0.0
    return known[1] - known[0] if len(values) == 2 else max(known) - min(known)


def _shared_splits(runs: Sequence[Compared]) -> list[str]:
    splits = Counter(split for run in runs for split in run.evaluations)
    return sorted(split for split, times in splits.items() if times > 1)


def _difference_table(runs: Sequence[Compared], differ: Sequence[tuple[str, list[str]]]) -> Table:
    columns = [Column("key", text=True), *(Column(run.letter, text=True, wide=True) for run in runs)]
    return Table(
        "differences", f"{count(len(differ))} keys differ", columns, [[key, *values] for key, values in differ]
    )


def _heads(heads: Sequence[str]) -> list[Column]:
    return [Column("run", text=True), *(Column(head, text=head == "state") for head in heads[1:])]


def _color(place: int) -> str:
    return f"var(--series-{place % len(SERIES)})"
