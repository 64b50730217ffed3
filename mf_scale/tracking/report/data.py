"""What the page shows of the training data: counts that whoever read the indexes hands over as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mf_scale.tracking.report.charts import Chart, Line
from mf_scale.tracking.report.table import Cell, Column, Table, count, number

_MOST_SIZES = 12
_GIB = 2**30
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class SourceCounts:
    """One training source by its index."""

    name: str
    missing: str = ""
    """Why nothing is known of it; then the rest is empty."""
    weight: float = 1.0
    samples: int = 0
    shards: int = 0
    bytes: int = 0
    vocabulary: str = ""
    kind: str = ""
    class_names: Sequence[str] = ()
    class_images: Sequence[int] = ()
    """Images that hold each class [K]."""
    segments: Mapping[int, int] = field(default_factory=dict)
    """Segments of an image -> images."""
    sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(height, width) -> images."""


@dataclass(frozen=True)
class DataView:
    """Tables, charts and sentences of the section on data."""

    tables: list[Table]
    charts: list[Chart]
    missing: list[str]


def class_images(sources: Sequence[SourceCounts], names: Sequence[str]) -> list[int] | None:
    """Training images of each class [K], where every source was read and labels as `names` does."""
    if not sources or any(source.missing or list(source.class_names) != list(names) for source in sources):
        return None
    return [sum(images) for images in zip(*(source.class_images for source in sources), strict=True)]


def data_view(sources: Sequence[SourceCounts]) -> DataView | None:
    """What there is to show; None without a source."""
    if not sources:
        return None
    read = [source for source in sources if not source.missing]
    missing = [f"{source.name}: {source.missing}" for source in sources if source.missing]
    if not read:
        return DataView([], [], missing)
    images = [sum(column) for column in zip(*(s.class_images for s in read), strict=True)] if _alike(read) else []
    charts = [chart for chart in (_class_chart(images), _segment_chart(read), _area_chart(read)) if chart is not None]
    tables = [_source_table(read), *([_class_table(read[0].class_names, images)] if images else []), _size_table(read)]
    return DataView(tables, charts, missing)


def _alike(read: Sequence[SourceCounts]) -> bool:
    return all(list(source.class_names) == list(read[0].class_names) for source in read)


def _source_table(read: Sequence[SourceCounts]) -> Table:
    whole = sum(source.weight for source in read) or 1.0
    rows: list[list[Cell | str]] = []
    for source in read:
        segments = sum(n * images for n, images in source.segments.items()) / max(1, source.samples)
        seen = sum(n > 0 for n in source.class_images)
        rows.append(
            [
                Cell(source.name, small=f"{source.vocabulary}, {source.kind}"),
                count(source.samples),
                count(source.shards),
                number(source.bytes / _GIB, 2),
                f"{count(seen)} of {count(len(source.class_names))}",
                number(segments),
                str(max(source.segments, default=0)),
                number(100 * source.weight / whole, 0),
            ]
        )
    columns = [
        Column("source", text=True),
        Column("images"),
        Column("shards"),
        Column("GiB"),
        Column("classes that occur"),
        Column("segments an image"),
        Column("at most"),
        Column("weight, %", about="share of every global batch"),
    ]
    caption = "1 training source" if len(read) == 1 else f"{len(read)} training sources"
    return Table("sources", caption, columns, rows)


def _class_table(names: Sequence[str], images: Sequence[int]) -> Table:
    """How many classes have how many images, and which have fewest and most."""
    ranked = sorted(range(len(names)), key=lambda k: (-images[k], k))
    present = [k for k in ranked if images[k]]
    rows: list[list[Cell | str]] = []
    for low, high in ((0, 0), (1, 9), (10, 99), (100, 999), (1000, 9999), (10_000, None)):
        members = [k for k in present if images[k] >= low and (high is None or images[k] <= high)]
        members = [k for k in ranked if not images[k]] if high == 0 else members
        if members:
            label = (
                "none" if high == 0 else f"{count(low)} or more" if high is None else f"{count(low)} to {count(high)}"
            )
            share = len(members) / len(names)
            named = ", ".join(names[k] for k in members[:4]) + (" …" if len(members) > 4 else "")
            rows.append([label, Cell(count(len(members)), bar=share), named])
    columns = [
        Column("images with the class", text=True),
        Column("classes"),
        Column("the most frequent", text=True, wide=True),
    ]
    return Table("class-images", "Classes by their training images", columns, rows)


def _size_table(read: Sequence[SourceCounts]) -> Table:
    sizes = _merged([source.sizes for source in read])
    whole = sum(sizes.values()) or 1
    ranked = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    rows: list[list[Cell | str]] = [
        [f"{width} x {height}", count(n), Cell(number(100 * n / whole), bar=n / whole)]
        for (height, width), n in ranked[:_MOST_SIZES]
    ]
    rest = sum(n for _, n in ranked[_MOST_SIZES:])
    if rest:
        rows.append([f"{count(len(ranked) - _MOST_SIZES)} others", count(rest), number(100 * rest / whole)])
    columns = [Column("width x height", text=True), Column("images"), Column("% of images")]
    return Table("sizes", "Image sizes", columns, rows)


def _class_chart(images: Sequence[int]) -> Chart | None:
    present = sorted((n for n in images if n), reverse=True)
    if len(present) < 2:
        return None
    line = Line("images", list(range(1, len(present) + 1)), present)
    return Chart(
        "data-classes", "Training images of a class", "images", [line], log=True, counted=True, across="class by rank"
    )


def _segment_chart(read: Sequence[SourceCounts]) -> Chart | None:
    counted = _merged([source.segments for source in read])
    if len(counted) < 2:
        return None
    most = max(counted)
    values = [counted.get(n, 0) for n in range(most + 1)]
    line = Line("images", list(range(most + 1)), values)
    return Chart(
        "data-segments", "Segments of an image", "images", [line], stacked=True, counted=True, across="segments"
    )


def _area_chart(read: Sequence[SourceCounts]) -> Chart | None:
    """Images by the length of a square of their area, in steps of a thirtieth of the largest."""
    sizes = _merged([source.sizes for source in read])
    sides = [((height * width) ** 0.5, n) for (height, width), n in sizes.items()]
    largest = max(side for side, _ in sides)
    step = max(1, round(largest / 30))
    counted: dict[int, int] = {}
    for side, n in sides:
        counted[int(side // step)] = counted.get(int(side // step), 0) + n
    if len(counted) < 2:
        return None
    places = list(range(max(counted) + 2))
    line = Line("images", [p * step for p in places], [counted.get(p, 0) for p in places])
    return Chart(
        "data-sizes", "Size of an image", "images", [line], stacked=True, counted=True, across="√ of its pixels"
    )


def _merged(parts: Sequence[Mapping[_Key, int]]) -> dict[_Key, int]:
    whole: dict[_Key, int] = {}
    for part in parts:
        for key, n in part.items():
            whole[key] = whole.get(key, 0) + n
    return whole
