"""What the page shows of each evaluated split: its numbers, classes, confusions and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mf_scale.rundir import RunDir
from mf_scale.tracking.pictures import embedded, read_png, sheet, write_bytes, write_png
from mf_scale.tracking.report.charts import draw_bars
from mf_scale.tracking.report.classes import ClassRow, band_table, class_rows, class_tables, measure_of, spread
from mf_scale.tracking.report.table import Cell, Column, Table, count, percent

MOST_BARS = 40
"""Classes that all get a bar in the picture of a split; of more only the best and the worst."""
CONFUSIONS = 15
"""Confusions that are shown; the others are folded."""
_WHY = {"worst": "worst", "median": "median", "best": "best", "first": "first of the split"}
"""Why a picture is shown, in the order of the page."""
_SEMANTIC = {"mIoU": "mIoU", "pixel_accuracy": "pixel acc.", "mean_accuracy": "mean acc.", "fwIoU": "fwIoU"}
_INSTANCES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


def split_view(run: RunDir, evaluation: Mapping[str, Any], images: Sequence[int] | None) -> dict[str, Any]:
    """What the page shows of one evaluated split; writes its PNG files. `images`: training images of each class."""
    name = split_name(evaluation)
    place = f"s-{''.join(c if c.isalnum() and c.isascii() else '-' for c in name)}"
    rows = class_rows(evaluation, images)
    measure = measure_of(evaluation)
    _write_bars(run, name, rows, measure)
    _write_sheet(run, evaluation)
    shown, folded = class_tables(rows, measure, place) if rows else ([], [])
    return {
        "name": name,
        "place": place,
        "measure": measure,
        "classes": len(rows),
        "vocabulary": len(evaluation["class_names"]),
        "bands": band_table(evaluation, rows, place),
        "spread": spread(rows),
        "shown": shown,
        "folded": folded,
        "confusions": _confusion_tables(evaluation, place),
        "uncounted": "confusions" in evaluation and evaluation["confusions"] is None,
        "score": evaluation.get("picture_score"),
        "pictures": _pictures(run, evaluation),
    }


def metric_tables(evaluations: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table a kind of number, one row a split."""
    tables = []
    for kind, caption, values_of in (
        ("semantic", "Semantic: every pixel a class", _semantic),
        ("panoptic", "Panoptic: every pixel a segment", _panoptic),
        ("instances", "Instances: masks by their scores", _instances),
    ):
        blocks = [(e, e[kind]) for e in evaluations if isinstance(e.get(kind), Mapping)]
        told = [(e, "federated" if block.get("federated") else "", values_of(block)) for e, block in blocks]
        told += [(e, "of boundaries", values_of(b["boundary"])) for e, b in blocks if "boundary" in b]
        names = list(
            dict.fromkeys(name for _, _, values in told for name, value in values.items() if value is not None)
        )
        if not names:
            continue
        rows: list[list[Cell | str]] = [
            [
                Cell(str(e["split"]), small=small),
                count(e["samples"]),
                count(e["step"]),
                *(percent(values.get(name)) for name in names),
            ]
            for e, small, values in told
        ]
        head = [Column("split", text=True), Column("images"), Column("step"), *map(Column, names)]
        tables.append(Table(f"numbers-{kind}", caption, head, rows))
    return tables


def _semantic(block: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: block.get(key) for key, name in _SEMANTIC.items()}


def _panoptic(block: Mapping[str, Any]) -> dict[str, float | None]:
    groups = {"all": "", "things": " things", "stuff": " stuff"}
    return {
        f"{measure}{words}": block[group].get(measure)
        for group, words in groups.items()
        if isinstance(block.get(group), Mapping)
        for measure in ("PQ", "SQ", "RQ")
    }


def _instances(block: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: block[name] for name in _INSTANCES if name in block}


def _confusion_tables(evaluation: Mapping[str, Any], place: str) -> list[Table]:
    """The costliest, and behind them all that are known."""
    names = evaluation["class_names"]
    rows: list[list[Cell | str]] = [
        [
            Cell(f"{names[one['truth']]} → {names[one['predicted']]}"),
            Cell(percent(one["share"]), bar=one["share"]),
            count(one["pixels"]),
        ]
        for one in evaluation.get("confusions") or []
    ]
    head = [
        Column("is → was taken for", text=True),
        Column("% of its pixels", about="of the pixels of the true class"),
        Column("pixels"),
    ]
    if len(rows) <= CONFUSIONS:
        return [Table(f"confusions-{place}", "The costliest confusions", head, rows)] if rows else []
    return [
        Table(f"confusions-{place}", f"The {CONFUSIONS} costliest confusions", head, rows[:CONFUSIONS]),
        Table(f"all-confusions-{place}", f"The {len(rows)} costliest", head, rows, tools=True),
    ]


def _pictures(run: RunDir, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    order = list(_WHY)
    told = sorted(
        evaluation["pictures"], key=lambda p: order.index(p["why"]) if p.get("why") in _WHY else len(order)
    )  # stable: of one kind in the evaluation's order
    return [
        {
            "key": picture["key"] + _missing_words(run, picture),
            "why": _WHY.get(str(picture.get("why")), ""),
            "score": picture.get("score"),
            "views": [{"title": view["title"], "data": embedded(file)} for view, file in _there(run, picture)],
        }
        for picture in told
    ]


def _there(run: RunDir, picture: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Path]]:
    """Views whose file is there: one of an evaluation that somebody tidied up, or copied in part, may be gone."""
    files = [(view, run.report / Path(view["file"]).name) for view in picture["views"]]
    return [(view, file) for view, file in files if file.is_file()]


def _missing_words(run: RunDir, picture: Mapping[str, Any]) -> str:
    missing = len(picture["views"]) - len(_there(run, picture))
    told = "1 picture is missing" if missing == 1 else f"{missing} pictures are missing"
    return f" ({told}: evaluate the run again)" if missing else ""


def _write_bars(run: RunDir, split: str, rows: Sequence[ClassRow], measure: str) -> None:
    """The classes as bars in a PNG file, the best on top."""
    if not rows:
        return
    best_first, half = rows[::-1], MOST_BARS // 2
    cut = len(rows) > MOST_BARS
    shown = [*best_first[:half], *best_first[-half:]] if cut else best_first
    title = f"{measure} by class, {split}" + (f": best and worst {half} of {len(rows):,}" if cut else "")
    bars = draw_bars([row.name for row in shown], [row.value for row in shown], title)
    write_bytes(run.report / f"classes-{split}.png", bars)


def _write_sheet(run: RunDir, evaluation: Mapping[str, Any]) -> None:
    """All pictures of the split in one PNG file."""
    found = [(picture, _there(run, picture)) for picture in evaluation["pictures"]]
    pictures = [picture for picture, views in found if len(views) == len(picture["views"])]
    if pictures:
        rows = [[read_png(file) for _, file in _there(run, picture)] for picture in pictures]
        titles = [v["title"] for v in pictures[0]["views"]]
        write_png(run.report / f"samples-{split_name(evaluation)}.png", sheet(rows, titles))


def split_name(evaluation: Mapping[str, Any]) -> str:
    """The name of a split as a part of a file's name."""
    return Path(str(evaluation["split"])).name
