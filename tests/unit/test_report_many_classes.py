"""The report of a large vocabulary: bands of which few classes occur, names that are long, cells that are empty."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

from mf_scale.tracking.report.charts import draw_bars
from mf_scale.tracking.report.classes import band_table, class_rows, measure_of
from mf_scale.tracking.report.table import Cell, Column, Table, table_html
from mf_scale.tracking.wandb_tables import evaluation_tables


def _texts(table: Table) -> list[list[str]]:
    return [[cell if isinstance(cell, str) else cell.text for cell in row] for row in table.rows]


def test_bands_tell_how_many_of_their_classes_the_split_holds() -> None:
    """Of LVIS's 1203 classes few images hold a few; and instances are ranked by AP, which knows what was looked for."""
    per_class: dict[str, Any] = {"panoptic": {"PQ": [0.5, None, None]}, "instances": {"AP": [0.25, None, None]}}
    evaluation: dict[str, Any] = {"task": "instance", "class_names": list("abc"), "things": [True] * 3}
    evaluation |= {part: {"per_class": values} for part, values in per_class.items()}
    numbers = {"PQ": 0.5, "AP": 0.25}
    evaluation["bands"] = {"of_class": ["rare", "rare", "common"]} | {
        "rare": {"classes": 2, **numbers},
        "common": {"classes": 1, "PQ": None, "AP": None},
    }
    rows = class_rows(evaluation)
    assert measure_of(evaluation) == "AP" and [(row.value, row.values["PQ"]) for row in rows] == [(0.25, 0.5)]
    table = band_table(evaluation, rows, "x")
    assert table is not None
    assert [column.name for column in table.columns][1:4] == ["classes", "AP", "PQ"]
    assert _texts(table) == [["rare", "1 of 2", "25.0", "50.0", "75.00"], ["common", "0 of 1", "-", "-", "0.00"]]


def test_long_names_leave_the_bars_room() -> None:
    """ADE20K-Full names a class by all its synonyms; the figure's layout collapsed with a warning."""
    names = ["person, individual, someone, somebody, mortal, soul" * 2, "wall"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw_bars(names, [0.5, 0.25], "IoU by class, val")
    blue = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    bars = (abs(blue - [0x2F, 0x6F, 0xDE]).sum(axis=2) < 12).any(axis=0)
    assert bars.sum() > 0.2 * len(bars), "half of the axis, which has most of the figure"


def test_a_cell_without_a_word_is_empty() -> None:
    """A phone leaves it out: no line "mostly taken for" with nothing behind it."""
    columns = [Column("class", text=True), Column("mostly taken for", text=True, wide=True)]
    said = str(table_html(Table("t", "caption", columns, [["sky", Cell("")], ["sea", Cell("sky 80%")]])))
    assert "<td></tr>" in said and "<td><span>sky 80%</span>" in said


def test_wandb_ranks_instances_by_ap_too() -> None:
    parts: dict[str, Any] = {"panoptic": {"PQ": [0.9, 0.1]}, "instances": {"AP": [0.2, 0.8]}}
    results = {"class_names": ["a", "b"], "things": [True] * 2} | {k: {"per_class": v} for k, v in parts.items()}
    names = {
        task: [row[0] for row in evaluation_tables({**results, "task": task})[0].rows] for task in ("instance", "x")
    }
    assert names == {"instance": ["b", "a"], "x": ["a", "b"]}
