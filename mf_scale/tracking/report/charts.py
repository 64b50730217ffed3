"""Curves of a run (matplotlib): as SVG that takes the page's colours, light or dark, and as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from mf_scale.tracking.report.chart_svg import GRID, INK, MUTED, PAPER, SERIES, for_page

RESUME, ROLLBACK, EVALUATION = "resumed", "went back", "evaluated"
"""Kinds of marks."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # a run or a class may be called $x$
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
MARKED = {RESUME: MUTED, ROLLBACK: SERIES[1], EVALUATION: SERIES[2]}
"""The colours of marks; the page has a key to them."""
MOST_NAMES = 12
"""Marks of a kind that are named; of more the names would cover each other."""
MOST_TEXTS = 60
"""Marks of a kind that have a text of their own; more are drawn at once, or a page would be made of marks."""
MOST_POINTS = 400
"""Points a line is drawn with at most; longer series are averaged over equal stretches."""
_STACK_POINTS = 120
_LONGEST_NAME = 36
"""Letters of a class beside its bar: ADE20K-Full's names of all synonyms would leave the bars no room."""
_DASHES = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)))


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
    kind: str = RESUME


@dataclass(frozen=True)
class Chart:
    """Series over steps, with marks where the run was resumed, went back or was evaluated."""

    name: str
    """Name of the file."""
    title: str
    unit: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = field(default_factory=tuple)
    log: bool = False
    """A logarithmic axis where the values span more than a decade and a half."""
    stacked: bool = False
    """Series one on top of the other, all at the first one's steps; otherwise each on its own."""
    counted: bool = False
    """Counts: drawn as they are, in steps where they are stacked, and not smoothed."""
    across: str = "step"
    """What runs from left to right."""


def draw(chart: Chart) -> tuple[str, bytes]:
    """(`draw_svg`, PNG)."""
    png = io.BytesIO()
    return _drawn(chart, png), png.getvalue()


def draw_svg(chart: Chart) -> str:
    """SVG to be put into a page that defines --ink, --muted, --grid and --series-N."""
    return _drawn(chart, None)


def _drawn(chart: Chart, png: io.BytesIO | None) -> str:
    # The salt keeps the ids of two charts in one page apart.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": chart.name}):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        _fill(figure, chart)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        if png is not None:
            figure.savefig(png, format="png", dpi=160, facecolor=PAPER)
    texts = {_mark_id(chart, i): mark.text for i, mark in enumerate(chart.marks)}
    return for_page(svg.getvalue(), _said(chart), texts)


def draw_bars(names: Sequence[str], values: Sequence[float], title: str) -> bytes:
    """Horizontal bars of values in [0, 1], first on top, as PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.26 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.barh(range(len(names)), values, color=SERIES[0], height=0.72)
        shown = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names]
        axes.set_yticks(range(len(names)), shown)
        axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), title=title)
        axes.grid(axis="y", visible=False)
        for row, value in enumerate(values):
            axes.text(min(value, 0.93) + 0.01, row, f"{value:.2f}", va="center", fontsize=9, color=INK)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110, facecolor=PAPER)
    return png.getvalue()


def _fill(figure: Figure, chart: Chart) -> None:
    axes = figure.add_subplot()
    (_stack if chart.stacked else _draw_lines)(axes, chart)
    _mark(axes, chart)
    if chart.log and _spans_decades(np.concatenate([np.asarray(line.values, dtype=float) for line in chart.lines])):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_power))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif chart.stacked:
        axes.set_ylim(bottom=0)
    named = any(_named(chart, mark) for mark in chart.marks)
    axes.set_title(chart.title, loc="left", fontsize=12.5, fontweight="bold", pad=17 if named else 6)
    axes.set_xlabel(chart.across, loc="right")
    axes.set_ylabel(chart.unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.tick_params(length=0)
    handles, names = axes.get_legend_handles_labels()
    if handles:
        few = len(handles) <= 3 and not chart.stacked
        # Many names stand below the curves, where they cover none.
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.16), "ncols": 3}
        place = {"loc": "best"} if few else place
        axes.legend(handles, names, fontsize=10 if few else 9.5, handlelength=1.4, columnspacing=1.2, **place)


def _draw_lines(axes: Axes, chart: Chart) -> None:
    for i, line in enumerate(chart.lines):
        if not line.values:
            continue  # another run has some; its colour is kept for it
        color, dashes = SERIES[i % len(SERIES)], _DASHES[i // len(SERIES) % len(_DASHES)]
        steps, values = _thinned(line, MOST_POINTS)
        name = _label(line.name) if len(chart.lines) > 1 else None
        look: dict[str, Any] = {"color": color, "linestyle": dashes}
        if line.points:
            axes.plot(steps, values, **look, marker="o", markersize=4.5, linewidth=1.4, label=name, zorder=4)
            continue
        window = 1 if chart.counted else max(1, len(values) // 25)
        if window > 1 and len(chart.lines) <= 3:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(steps, _smoothed(values, window), **look, linewidth=1.9, label=name, zorder=3)


def _stack(axes: Axes, chart: Chart) -> None:
    thin = [_thinned(line, _STACK_POINTS) for line in chart.lines]
    names = [_label(line.name) for line in chart.lines] if len(chart.lines) > 1 else []
    look: dict[str, Any] = {"colors": [SERIES[i % len(SERIES)] for i in range(len(thin))], "alpha": 0.85}
    step = "mid" if chart.counted else None
    axes.stackplot(thin[0][0], *(values for _, values in thin), labels=names, linewidth=0, step=step, **look)


def _mark(axes: Axes, chart: Chart) -> None:
    """Lines where a start went on, triangles where the run was evaluated, each in a group that gets the mark's text."""
    crowded = {kind for kind in MARKED if sum(mark.kind == kind for mark in chart.marks) > MOST_TEXTS}
    for kind in crowded:
        steps, high = [mark.step for mark in chart.marks if mark.kind == kind], 0.03 if kind == EVALUATION else 1.0
        within = axes.get_xaxis_transform()
        axes.vlines(steps, 0.0, high, transform=within, color=MARKED[kind], linewidth=0.6, alpha=0.6, zorder=2)
    for i, mark in enumerate(chart.marks):
        if mark.kind in crowded:
            continue
        color, group = MARKED[mark.kind], _mark_id(chart, i)
        if mark.kind == EVALUATION:
            axes.plot([mark.step], [0.0], marker="^", markersize=6, color=color, linestyle="none", clip_on=False,
                      transform=axes.get_xaxis_transform(), gid=group, zorder=6)  # fmt: skip
            continue
        axes.axvline(mark.step, color=color, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2)
        # As broad as a pointer is exact, and not to be seen.
        axes.axvline(mark.step, linewidth=9, alpha=0.0, zorder=5, gid=group)
        if _named(chart, mark):
            axes.annotate(mark.name, (mark.step, 1.0), (0, 2), axes.get_xaxis_transform(), "offset points",
                          ha="center", va="bottom", fontsize=8.5, color=color)  # fmt: skip


def _named(chart: Chart, mark: Mark) -> bool:
    return mark.kind != EVALUATION and sum(one.kind != EVALUATION for one in chart.marks) <= MOST_NAMES


def _mark_id(chart: Chart, place: int) -> str:
    return f"{chart.name}-mark-{place}"


def _label(name: str) -> str:
    """matplotlib takes a label that begins with an underscore for none."""
    short = name if len(name) <= 28 else f"…{name[-27:]}"
    return f" {short}" if short.startswith("_") else short


def _said(chart: Chart) -> str:
    """The chart in words, for whom the picture is none."""
    said = [
        f"{line.name} from {line.values[0]:.4g} to {line.values[-1]:.4g}" for line in chart.lines[:8] if line.values
    ]
    return f"{chart.title}{f' in {chart.unit}' if chart.unit else ''} by {chart.across}: {'; '.join(said)}"


def _thinned(line: Line, most: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points, averaged over equal stretches where there are too many to see."""
    steps, values = np.asarray(line.steps, dtype=float), np.asarray(line.values, dtype=float)
    if line.points or len(values) <= most:
        return steps, values
    edges = np.linspace(0, len(values), most + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(values)))
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def _smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the neighbourhood of each point, cut at the ends (so that they are not pulled down)."""
    ones = np.ones(min(2 * (window // 2) + 1, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _spans_decades(values: NDArray[np.float64]) -> bool:
    return values.size > 0 and bool(values.min() > 0) and bool(values.max() > 30 * values.min())


def _power(value: float, _: int | None = None) -> str:
    return _thousands(value) if value >= 1e-3 else f"{value:.0e}"


def _thousands(value: float, _: int | None = None) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
