"""Tables and pictures that W&B shows of an evaluation, from what it left in RUN/report. Plain values, no W&B here.

K: classes of the vocabulary. Whatever K is, every table stays readable and every mask within the 8 bits that W&B's
picture masks have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

WHOLE_TABLE = 1000
"""Classes up to which one table holds them all; of more there are the best and the worst."""
MOST_SHOWN = 50
"""Classes in the table of the best ones and in that of the worst ones."""
MOST_PICTURES = 6
MASK_IDS = 254
"""Classes that one mask can tell apart: 0 is "none", 255 "another class"."""
_OTHER = 255
_BAND_VALUES = ("mIoU", "PQ", "AP")


@dataclass(frozen=True)
class Table:
    """Rows under columns."""

    name: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Overlay:
    """One image with class masks to lay over it; drawn pictures where there are no masks."""

    caption: str
    image: Path
    masks: dict[str, NDArray[np.uint8]]
    """Title of a view -> [h,w]: 0 none, i + 1 the i-th of the classes that masks tell apart, 255 another one."""


def evaluation_tables(results: Mapping[str, Any]) -> list[Table]:
    """Bands where there are some; all classes, or of more than WHOLE_TABLE the best and the worst."""
    tables = []
    bands = results.get("bands") or {}
    rows = [
        [name, told.get("classes"), *(told.get(value) for value in _BAND_VALUES)]
        for name, told in bands.items()
        if isinstance(told, Mapping)
    ]
    if rows:
        tables.append(Table("bands", ["band", "classes", *_BAND_VALUES], rows))
    columns, values = _class_columns(results)
    if not columns:
        return tables
    heads = ["class", "id", "thing", *(["band"] if bands.get("of_class") else []), *columns]
    ranked = _ranked(columns, values, instances=results.get("task") == "instance")
    whole = len(results["class_names"]) <= WHOLE_TABLE
    wanted = (
        [("classes", ranked)] if whole else [("best", ranked[:MOST_SHOWN]), ("worst", ranked[: -MOST_SHOWN - 1 : -1])]
    )
    for name, labels in wanted:
        rows = []
        for label in labels:
            band = [bands["of_class"][label]] if bands.get("of_class") else []
            head = [results["class_names"][label], label, bool(results["things"][label]), *band]
            rows.append([*head, *(column[label] for column in values)])
        tables.append(Table(name, heads, rows))
    return tables


def _class_columns(results: Mapping[str, Any]) -> tuple[list[str], list[Sequence[Any]]]:
    """Names of the values by class, and for each its K values."""
    count = len(results["class_names"])
    named: dict[str, Sequence[Any]] = {}
    for part in ("semantic", "panoptic", "instances"):
        for name, values in ((results.get(part) or {}).get("per_class") or {}).items():
            if isinstance(values, list) and len(values) == count:
                named.setdefault(name, values)
    return list(named), list(named.values())


def _ranked(columns: Sequence[str], values: Sequence[Sequence[Any]], *, instances: bool) -> list[int]:
    """Classes that have a value, best first, by IoU, else PQ, else AP; `instances` by AP, as in the report."""
    measures = ("AP",) if instances else ("IoU", "PQ", "AP")
    by = next((name for name in measures if name in columns), columns[0])
    column = values[columns.index(by)]
    present = [label for label, value in enumerate(column) if value is not None]
    return sorted(present, key=lambda label: (-column[label], label))


def told_apart(classes: int, known: Sequence[int], maps: Sequence[NDArray[Any]]) -> list[int]:
    """The classes that masks tell apart, MASK_IDS at most: those `known` from before, then what `maps` show most of.

    W&B keeps one dictionary of names for all masks of a panel, the last one: so it may grow, never change.
    """
    if classes <= MASK_IDS:
        return list(range(classes))
    pixels = np.zeros(classes, dtype=np.int64)
    for shown in maps:
        pixels += np.bincount(shown[shown >= 0].ravel(), minlength=classes)[:classes]
    pixels[list(known)] = 0
    order = np.argsort(-pixels, kind="stable")[: MASK_IDS - len(known)]
    return [*known, *(int(label) for label in order if pixels[label])]


def mask_names(names: Sequence[str], apart: Sequence[int]) -> dict[int, str]:
    """Value in a mask -> class name."""
    told = {place + 1: names[label] for place, label in enumerate(apart)}
    return {0: "none", **told, **({_OTHER: "another class"} if len(apart) < len(names) else {})}


def evaluation_overlays(
    results: Mapping[str, Any], folder: Path, known: Sequence[int]
) -> tuple[list[Overlay], list[int]]:
    """A few pictures of an evaluation, of each kind in turn, with their masks, and the classes that these tell apart.

    A view's "classes" names its class map (`pictures.write_class_map`). What cannot be read is left out.
    """
    found: list[tuple[str, Path, dict[str, NDArray[np.int64]]]] = []
    for picture in _few(results.get("pictures") or []):
        views = picture.get("views") or []
        if not views:
            continue
        maps = {
            view["title"]: _read_class_map(folder / Path(view["classes"]).name) for view in views if "classes" in view
        }
        caption = " · ".join(str(part) for part in (picture.get("key"), picture.get("why")) if part)
        photo = folder / Path(views[0]["file"]).name
        read = {title: _fitted(shown, photo) for title, shown in maps.items() if shown is not None and photo.is_file()}
        if read:
            found.append((caption, photo, read))
        else:
            found += [(f"{caption} · {view['title']}", folder / Path(view["file"]).name, {}) for view in views[1:]]
    found = [one for one in found if one[1].is_file()]
    count = len(results["class_names"])
    apart = told_apart(count, known, [shown for _, _, maps in found for shown in maps.values()])
    value_of = np.full(count + 1, _OTHER, dtype=np.uint8)
    value_of[apart] = np.arange(1, len(apart) + 1)
    value_of[count] = 0  # index -1: none
    return [Overlay(caption, image, {t: value_of[m] for t, m in maps.items()}) for caption, image, maps in found], apart


def _few(pictures: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """MOST_PICTURES at most: the first of each kind (worst, first, ...), then the second of each, and so on."""
    kinds = ("worst", "first", "best", "median")
    turns: dict[Any, int] = {}
    keyed = []
    for place, picture in enumerate(pictures):
        why = picture.get("why")
        turn = turns[why] = turns.get(why, -1) + 1
        keyed.append((turn, kinds.index(why) if why in kinds else len(kinds), place))
    return [pictures[place] for _, _, place in sorted(keyed)[:MOST_PICTURES]]


def _fitted(shown: NDArray[np.int64], photo: Path) -> NDArray[np.int64]:
    """The map at the size of its picture, pixel by pixel of the nearest."""
    with Image.open(photo) as image:
        size = image.size
    return cv2.resize(shown.astype(np.int32), size, interpolation=cv2.INTER_NEAREST_EXACT).astype(np.int64)


def _read_class_map(file: Path) -> NDArray[np.int64] | None:
    stored = cv2.imread(str(file), cv2.IMREAD_UNCHANGED) if file.is_file() else None
    return None if stored is None or stored.ndim != 2 else stored.astype(np.int64) - 1
