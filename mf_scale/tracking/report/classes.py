"""The classes of an evaluated split, those first whose loss of IoU costs the mean most; and the bands of frequency.

A mean over classes loses (1 - IoU) / (classes that occur) by each class: what a perfect one would add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mf_scale.tracking.pictures import class_color
from mf_scale.tracking.report.table import Cell, Column, Table, count, number, percent

FEW = 40
"""Classes that all stand in the first table; of more the costliest do, and the whole table is folded."""
SHOWN = 20
MANY = 500
"""Classes above which the costliest and the best 50 are shown."""
SHOWN_OF_MANY = 50
_BANDS = ("rare", "common", "frequent")
_DECILES = 10


@dataclass(frozen=True)
class ClassRow:
    """One class that occurs in the split. Shares are of 1; None: not of the task, or not known."""

    label: int
    name: str
    thing: bool
    value: float
    """What the split's mean is taken over: IoU, else PQ, else AP."""
    lost: float
    """What it takes from that mean."""
    share: float | None
    """Of the pixels of the ground truth."""
    band: str | None
    images: int | None
    """Training images that hold it."""
    taken_for: str
    """The class that most of its pixels were taken for, and their share."""
    values: Mapping[str, float | None] = field(default_factory=dict)
    """PQ, SQ, RQ, AP where they are not `value`."""


def measure_of(evaluation: Mapping[str, Any]) -> str:
    """What the classes of the split are ranked by.

    Instances by AP: their PQ cannot tell what nobody looked for, as in LVIS, from what is not there.
    """
    blocks = [("semantic", "IoU"), ("panoptic", "PQ"), ("instances", "AP")]
    if evaluation.get("task") == "instance":
        blocks.reverse()
    return next((measure for block, measure in blocks if evaluation.get(block)), "IoU")


def mean_of(measure: str) -> str:
    """What the mean of the measure over classes is called."""
    return "mIoU" if measure == "IoU" else measure


def class_values(evaluation: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Measure -> its values by class, whichever the split has."""
    found: dict[str, list[float | None]] = {}
    for block, measures in (("semantic", ("IoU",)), ("panoptic", ("PQ", "SQ", "RQ")), ("instances", ("AP",))):
        per_class = (evaluation.get(block) or {}).get("per_class") or {}
        found |= {measure: per_class[measure] for measure in measures if measure in per_class}
    return found


def class_rows(evaluation: Mapping[str, Any], images: Sequence[int] | None = None) -> list[ClassRow]:
    """The classes that occur, the costliest first; of equals the one with most pixels. `images` [K] of the training."""
    names, values, measure = evaluation["class_names"], class_values(evaluation), measure_of(evaluation)
    ranked = values.pop(measure, [None] * len(names))
    pixels = (((evaluation.get("semantic") or {}).get("per_class")) or {}).get("pixels")
    whole, present = max(1, sum(pixels or [])), max(1, sum(value is not None for value in ranked))
    bands = (evaluation.get("bands") or {}).get("of_class") or [None] * len(names)
    taken = _taken_for(evaluation)
    rows = [
        ClassRow(
            label=k,
            name=names[k],
            thing=bool(evaluation["things"][k]),
            value=value,
            lost=(1 - value) / present,
            share=pixels[k] / whole if pixels else None,
            band=bands[k],
            images=images[k] if images is not None else None,
            taken_for=taken.get(k, ""),
            values={name: one[k] for name, one in values.items()},
        )
        for k, value in enumerate(ranked)
        if value is not None
    ]
    return sorted(rows, key=lambda row: (row.value, -(row.share or 0.0)))


def class_tables(rows: Sequence[ClassRow], measure: str, name: str) -> tuple[list[Table], list[Table]]:
    """(tables to show, tables to fold). `name`: of the split's place in the page."""
    if len(rows) <= FEW:
        return [_table(rows, measure, f"classes-{name}", f"All {len(rows)} classes", tools=True, rich=True)], []
    many = len(rows) > MANY
    shown = SHOWN_OF_MANY if many else SHOWN
    costly = _table(
        rows[:shown], measure, f"costly-{name}", f"The {shown} classes that cost {mean_of(measure)} most", rich=True
    )
    best = [_table(rows[: -shown - 1 : -1], measure, f"best-{name}", f"The {shown} best classes", rich=True)]
    caption = f"All {count(len(rows))} classes"
    return [costly], [*best, _table(rows, measure, f"classes-{name}", caption, tools=True, brief=many)]


def band_table(evaluation: Mapping[str, Any], rows: Sequence[ClassRow], name: str) -> Table | None:
    """The bands of frequency: what each reaches, and what it costs the mean; None where the split knows none."""
    bands, measure = evaluation.get("bands"), measure_of(evaluation)
    if not bands:
        return None
    known = [band for band in _BANDS if isinstance(bands.get(band), Mapping)]
    measures = [m for m in ("mIoU", "PQ", "AP") if any(bands[band].get(m) is not None for band in known)]
    measures.sort(key=lambda m: m != mean_of(measure))
    columns = [Column("band", text=True), Column("classes", about="that occur in the split, of the band's")]
    columns += [*map(Column, measures), _lost_column(measure)]
    cells: list[list[Cell | str]] = []
    for band in known:
        own = [row for row in rows if row.band == band]
        values = [bands[band].get(m) for m in measures]
        bars = [Cell(percent(v), bar=v) if v is not None else "-" for v in values]
        lost = number(100 * sum(row.lost for row in own), 2)
        classes = f"{count(len(own))} of {count(bands[band].get('classes'))}"
        cells.append([band, classes, *bars, lost])
    return Table(f"bands-{name}", "By frequency band", columns, cells)


def spread(rows: Sequence[ClassRow]) -> list[tuple[str, int, float]]:
    """How many classes reach what: (tenth, classes, height of 1)."""
    counts = [0] * _DECILES
    for row in rows:
        counts[min(_DECILES - 1, int(row.value * _DECILES))] += 1
    highest = max(counts) or 1
    return [(f"{10 * i}", n, n / highest) for i, n in enumerate(counts)]


def _table(
    rows: Sequence[ClassRow], measure: str, name: str, caption: str, *, tools: bool = False, rich: bool = False,
    brief: bool = False,
) -> Table:  # fmt: skip
    """`rich`: with bars and colours; `brief`: without what can be told from the rest, for a table of thousands."""
    others = [m for m in rows[0].values if any(row.values[m] is not None for row in rows)]
    others = [m for m in others if m not in ("SQ", "RQ")] if rich else others
    has = {
        "band": any(row.band for row in rows),
        "share": any(row.share is not None for row in rows),
        "images": any(row.images is not None for row in rows),
        "taken": any(row.taken_for for row in rows) and not brief,
    }
    columns = [Column("class", text=True), Column("kind", text=True), Column(measure)]
    columns += [] if brief else [_lost_column(measure)]
    columns += [Column("pixels, %", about="of the ground truth")] if has["share"] else []
    columns += [Column("band", text=True)] if has["band"] else []
    columns += [Column("images", about="training images that hold it")] if has["images"] else []
    columns += [Column(name) for name in others]
    columns += [Column("mostly taken for", text=True, wide=True)] if has["taken"] else []
    cells: list[list[Cell | str]] = []
    for row in rows:
        value = percent(row.value)
        color = "#{:02x}{:02x}{:02x}".format(*class_color(row.label))
        cell: list[Cell | str] = [
            Cell(row.name, color=color) if rich else row.name,
            "thing" if row.thing else "stuff",
            Cell(value, bar=row.value) if rich else value,
        ]
        cell += [] if brief else [number(100 * row.lost, 3 if row.lost < 0.001 else 2)]
        cell += [_fine(row.share)] if has["share"] else []
        cell += [row.band or "-"] if has["band"] else []
        cell += [count(row.images)] if has["images"] else []
        cell += [percent(row.values.get(name)) for name in others]
        cell += [row.taken_for] if has["taken"] else []
        cells.append(cell)
    return Table(name, caption, columns, cells, tools=tools)


def _fine(share: float | None) -> str:
    """In percent, small ones with two digits that count."""
    return "-" if share is None else f"{100 * share:.2g}" if share < 0.001 else percent(share, 2)


def _lost_column(measure: str) -> Column:
    return Column("lost, points", about=f"points that a perfect {measure} would add to the mean")


def _taken_for(evaluation: Mapping[str, Any]) -> dict[int, str]:
    names = evaluation["class_names"]
    found: dict[int, tuple[float, str]] = {}
    for one in evaluation.get("confusions") or []:
        told = f"{names[one['predicted']]} {percent(one['share'], 0)}%"
        best = found.get(one["truth"])
        if best is None or one["share"] > best[0]:
            found[one["truth"]] = (one["share"], told)
    return {truth: told for truth, (_, told) in found.items()}
