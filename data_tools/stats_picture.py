"""Stats as a picture: how frequent the classes are, how much they cover, segments an image, image sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMED = 40
"""So many classes get a bar and a name each; more get a curve, and names for the first by images and by pixels."""
TOP = 18
"""Classes named beside the curve."""
COLOURS = {"frequent": "#31688e", "common": "#35b779", "rare": "#f39c12", "absent": "#bbbbbb"}
LONGEST = 26
"""Characters of a class name."""


def draw_counts(counts: dict[str, Any], picture: Path) -> None:
    """Write a PNG of what `count_source` counted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pixels = max(counts["pixels"], 1)
    rows = [{**row, "share": round(100 * row["pixels"] / pixels, 2)} for row in counts["classes"]]
    rows.sort(key=lambda row: (-row["images"], -row["pixels"], row["name"]))
    few = len(rows) <= NAMED
    height = 4.2 + (max(0.24 * len(rows), 1.6) if few else 9.0)
    figure = Figure(figsize=(14, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    bands = ", ".join(f"{number} {band}" for band, number in counts["bands"].items() if number)
    about = f"{counts['samples']:,} samples, {counts['vocabulary']} ({counts['kind']}), classes: {bands}"
    figure.suptitle(f"{counts['source']}\n{about}", fontsize=11)
    parts: Any = figure.subfigures(2, 1, height_ratios=[height - 4.2, 4.2])
    classes, rest = parts
    if few:
        left, right = classes.subplots(1, 2, sharey=True)
        _bars(left, rows, "images", "images")
        _bars(right, rows, "share", "% of pixels")
        _key(right, counts["bands"])
    else:
        above, below = classes.subfigures(2, 1, height_ratios=[3.6, 5.4])
        curve = above.subplots()
        _curve(curve, rows)
        _key(curve, counts["bands"])
        left, right = below.subplots(1, 2)
        _bars(left, rows[:TOP], "images", f"images of the {TOP} most frequent classes")
        largest = sorted(rows, key=lambda row: -row["pixels"])
        _bars(right, largest[:TOP], "share", f"% of pixels of the {TOP} classes that cover most")
    panels = rest.subplots(1, 3)
    _segments(panels[0], counts["segments_per_image"])
    _sizes(panels[1], counts["sizes"])
    _cover(panels[2], counts, rows)
    figure.savefig(picture)


def _bars(axes: Any, rows: list[dict[str, Any]], what: str, title: str) -> None:
    """One bar a class with its name and number."""
    places = range(len(rows))
    axes.barh(places, [row[what] for row in rows], color=[COLOURS[row["frequency"]] for row in rows])
    names = [row["name"] if len(row["name"]) <= LONGEST else row["name"][: LONGEST - 1] + "…" for row in rows]
    axes.set_yticks(places, [name.replace("$", r"\$") for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for place, row in zip(places, rows, strict=True):
        axes.annotate(f" {row[what]:,}", (row[what], place), va="center", fontsize=7)
    axes.margins(x=0.14)
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _curve(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Images of all classes by rank, coloured by band, on a logarithmic scale."""
    for band, colour in COLOURS.items():
        ranks = [rank for rank, row in enumerate(rows, 1) if row["frequency"] == band]
        if ranks:
            images = [max(rows[rank - 1]["images"], 0.6) for rank in ranks]
            axes.bar(ranks, images, width=1.0, color=colour, linewidth=0)
    axes.set_yscale("log")
    powers = [10**power for power in range(7) if not power or 10**power <= 2 * rows[0]["images"]]
    axes.set_yticks(powers, [f"{power:,}" for power in powers])
    axes.minorticks_off()
    axes.set_ylim(bottom=0.5)
    axes.set_xlim(0.5, len(rows) + 0.5)
    axes.set_xlabel(f"{len(rows)} classes by rank", fontsize=9)
    axes.set_title("images a class", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _key(axes: Any, bands: dict[str, int]) -> None:
    """Which colour is which band, and how many classes are in it."""
    from matplotlib.patches import Patch

    patches = [Patch(color=COLOURS[band], label=f"{band}: {number}") for band, number in bands.items() if number]
    axes.legend(handles=patches, fontsize=8, frameon=False, title="band: classes", title_fontsize=8, loc="best")


def _segments(axes: Any, counted: dict[str, int]) -> None:
    """How many images have so many segments."""
    numbers = [int(number) for number in counted]
    most = max(numbers, default=0)
    width = most // 40 + 1
    axes.hist(
        numbers,
        bins=[edge - 0.5 for edge in range(0, most + width + 1, width)],
        weights=list(counted.values()),
        color="#31688e",
    )
    total = sum(counted.values())
    mean = sum(int(number) * images for number, images in counted.items()) / max(total, 1)
    axes.set_title(f"segments an image: {mean:.1f} on average, {most} at most", fontsize=10)
    axes.set_xlabel("segments", fontsize=9)
    axes.set_ylabel("images", fontsize=9)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _sizes(axes: Any, sizes: list[dict[str, int]]) -> None:
    """A dot for each size of image, its area by the number of images."""
    most = max((size["images"] for size in sizes), default=1)
    area = [12 + 300 * size["images"] / most for size in sizes]
    axes.scatter([s["width"] for s in sizes], [s["height"] for s in sizes], s=area, color="#31688e", alpha=0.4, lw=0)
    told = f": most {sizes[0]['width']}x{sizes[0]['height']} ({sizes[0]['images']:,})" if sizes else ""
    axes.set_title(f"{len(sizes)} image sizes{told}", fontsize=10)
    axes.set_xlabel("width", fontsize=9)
    axes.set_ylabel("height", fontsize=9)
    axes.margins(0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _cover(axes: Any, counts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """What the pixels are: things, stuff, no segment, ignored."""
    things, stuff = (sum(row["pixels"] for row in rows if row["thing"] is thing) for thing in (True, False))
    shares = {
        "things": things,
        "stuff": stuff,
        "no segment": counts["unlabelled_pixels"],
        "ignored": counts["ignored_pixels"],
    }
    total = max(counts["pixels"], 1)
    axes.barh(range(4), [100 * value / total for value in shares.values()], color="#31688e")
    axes.set_yticks(range(4), shares, fontsize=9)
    axes.invert_yaxis()
    for place, value in enumerate(shares.values()):
        axes.annotate(f" {100 * value / total:.1f} %", (100 * value / total, place), va="center", fontsize=8)
    axes.margins(x=0.16)
    axes.set_title("% of pixels (where segments overlap, each counts)", fontsize=10)
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
