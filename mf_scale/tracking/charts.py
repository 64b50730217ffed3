"""Curves of a run (matplotlib): as SVG that takes the page's colours, light or dark, and as PNG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

INK, MUTED, GRID, PAPER = "#1c2430", "#6a7584", "#e3e7ec", "#ffffff"
SERIES = ("#2f6fde", "#e0662b", "#2a9d6f", "#9b51c9")
_PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{c: f"var(--series-{i})" for i, c in enumerate(SERIES)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}
MOST_NAMES = 12
"""Marks that are named; of more the names would cover each other."""
MOST_POINTS = 400
"""Points a line is drawn with at most; longer series are averaged over equal stretches."""


@dataclass(frozen=True)
class Line:
    """One series of a chart; all values are finite."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    points: bool = False
    """Few measured values: markers joined by a line; otherwise a smoothed line over the raw one."""


@dataclass(frozen=True)
class Mark:
    """A step at which something happened to the run."""

    step: int
    name: str
    """A few letters that stand at the mark."""
    text: str
    """What a pointer over the mark shows."""


@dataclass(frozen=True)
class Chart:
    """Series over steps, with marks where the run was resumed."""

    name: str
    """Name of the file."""
    title: str
    unit: str
    lines: Sequence[Line]
    resumes: Sequence[Mark] = field(default_factory=tuple)
    log: bool = False
    """A logarithmic axis where the values span more than a decade and a half."""


def draw(chart: Chart) -> tuple[str, bytes]:
    """(SVG to be put into a page that defines --ink, --muted, --grid and --series-N; PNG)."""
    salt = chart.name  # keeps the ids of two charts in one page apart
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        _fill(figure, chart)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=160, facecolor=PAPER)
    return _for_page(svg.getvalue(), chart), png.getvalue()


def draw_bars(names: Sequence[str], values: Sequence[float], title: str) -> bytes:
    """Horizontal bars of values in [0, 1], first on top, as PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.26 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.barh(range(len(names)), values, color=SERIES[0], height=0.72)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), title=title)
        axes.grid(axis="y", visible=False)
        for row, value in enumerate(values):
            axes.text(min(value, 0.93) + 0.01, row, f"{value:.2f}", va="center", fontsize=9, color=INK)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110, facecolor=PAPER)
    return png.getvalue()


def _fill(figure: Figure, chart: Chart) -> None:
    axes = figure.add_subplot()
    for line, color in zip(chart.lines, SERIES, strict=False):
        steps, values = _thinned(line)
        name = line.name if len(chart.lines) > 1 else None
        if line.points:
            axes.plot(steps, values, color=color, marker="o", markersize=4.5, linewidth=1.4, label=name, zorder=4)
            continue
        window = max(1, len(values) // 25)
        if window > 1:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(steps, _smoothed(values, window), color=color, linewidth=1.9, label=name, zorder=3)
    _mark(axes, chart)
    if chart.log and _spans_decades(np.concatenate([np.asarray(line.values, dtype=float) for line in chart.lines])):
        axes.set_yscale("log")
    named = 0 < len(chart.resumes) <= MOST_NAMES
    axes.set_title(chart.title, loc="left", fontsize=12.5, fontweight="bold", pad=17 if named else 6)
    axes.set_xlabel("step", loc="right")
    axes.set_ylabel(chart.unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.tick_params(length=0)
    if len(chart.lines) > 1 or chart.resumes:
        axes.legend(fontsize=10, handlelength=1.6)


def _mark(axes: Axes, chart: Chart) -> None:
    """Lines at the resumes, each in a group that `_for_page` gives its text; names where there is room for them."""
    for i, mark in enumerate(chart.resumes):
        label = "resumed" if i == 0 else None
        axes.axvline(mark.step, color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)), label=label, zorder=2)
        # As broad as a pointer is exact, and not to be seen.
        axes.axvline(mark.step, linewidth=9, alpha=0.0, zorder=5, gid=_mark_id(chart, i))
        if len(chart.resumes) <= MOST_NAMES:
            at = (mark.step, 1.0)
            axes.annotate(mark.name, at, (0, 2), axes.get_xaxis_transform(), "offset points",
                          ha="center", va="bottom", fontsize=8.5, color=MUTED)  # fmt: skip


def _mark_id(chart: Chart, place: int) -> str:
    return f"{chart.name}-mark-{place}"


def _thinned(line: Line) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points, averaged over equal stretches where there are too many to see."""
    steps, values = np.asarray(line.steps, dtype=float), np.asarray(line.values, dtype=float)
    if line.points or len(values) <= MOST_POINTS:
        return steps, values
    parts = [np.array_split(a, MOST_POINTS) for a in (steps, values)]
    thin_steps, thin_values = (np.array([part.mean() for part in array]) for array in parts)
    return thin_steps, thin_values


def _smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the neighbourhood of each point, cut at the ends (so that they are not pulled down)."""
    ones = np.ones(min(2 * (window // 2) + 1, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _spans_decades(values: NDArray[np.float64]) -> bool:
    return values.size > 0 and bool(values.min() > 0) and bool(values.max() > 30 * values.min())


def _thousands(value: float, _: int | None = None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _for_page(svg: str, chart: Chart) -> str:
    """The <svg> element alone: sized by the page, fonts and colours of the page, a name for screen readers, and the
    texts of the marks."""
    element = svg[svg.index("<svg") :]
    for color, variable in _PAGE_COLOURS.items():
        element = element.replace(color, variable)
    element = re.sub(r"'DejaVu Sans'(, [\w-]+)*", "inherit", element)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    for i, mark in enumerate(chart.resumes):
        group = f'<g id="{_mark_id(chart, i)}">'
        element = element.replace(group, f"{group}<title>{html.escape(mark.text)}</title>", 1)
    return element.replace("<svg", f'<svg role="img" aria-label="{html.escape(chart.title)}"', 1)
