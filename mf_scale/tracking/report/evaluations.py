"""What evaluations have left in RUN/report, held to the shape that a page needs: the files are anybody's to edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mf_scale.errors import UserError
from mf_scale.rundir import RunDir, read_json

_REMEDY = "Evaluate the run again, or remove the file."
_MEASURES = ("mIoU", "PQ", "AP")
_SEMANTIC = ("mIoU", "pixel_accuracy", "mean_accuracy")
_PER_CLASS = {"semantic": ("IoU", "pixels"), "panoptic": ("PQ", "SQ", "RQ"), "instances": ("AP",)}
_BANDS = ("rare", "common", "frequent")


def read_evaluations(run: RunDir) -> list[dict[str, Any]]:
    """One of each split; UserError where a file cannot be read or is of another shape than `evaluate` writes."""
    return [_read(file) for file in sorted(run.report.glob("evaluation-*.json"))]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file)
    except UserError as error:
        raise UserError(error.what, where=str(file), remedy=_REMEDY) from error
    if wrong := wrong_in(found):
        raise UserError(
            f"this is no evaluation: {wrong} is missing or of another kind", where=str(file), remedy=_REMEDY
        )
    return found


def wrong_in(found: Mapping[str, Any]) -> str:
    """The first key that is not what a page needs; empty for an evaluation. What older programs left out may lack."""
    names = found.get("class_names")
    if not (_is_list(names, str) and names):
        return "class_names"
    classes, confusions = len(names), found.get("confusions") or []
    sound = {
        "split": isinstance(found.get("split"), str) and found["split"] != "",
        "samples": _is_count(found.get("samples")),
        "step": _is_count(found.get("step")),
        "images_per_second": _is_number(found.get("images_per_second")),
        "things": _is_list(found.get("things"), bool) and len(found["things"]) == classes,
        "pictures": _is_list(found.get("pictures"), dict) and all(map(_is_picture, found["pictures"])),
        "confusions": _is_list(confusions, dict) and all(_is_confusion(one, classes) for one in confusions),
        **{name: _may_be_number(found.get(name)) for name in _MEASURES},
        **{name: _is_block(name, found[name], classes) for name in _PER_CLASS if name in found},
        "bands": "bands" not in found or _is_bands(found["bands"], classes),
    }
    return next((key for key, fine in sound.items() if not fine), "")


def _is_block(name: str, block: object, classes: int) -> bool:
    """The numbers of one kind and their values by class."""
    if not (isinstance(block, Mapping) and isinstance(block.get("per_class"), Mapping)):
        return False
    if name == "panoptic":
        numbers = all(_has(block.get(group), ("PQ", "SQ", "RQ")) for group in ("all", "things", "stuff"))
    else:
        numbers = _has(block, _SEMANTIC if name == "semantic" else ("AP",))
    per_class = block["per_class"]
    values = [per_class[measure] for measure in _PER_CLASS[name] if measure in per_class]
    known = all(_is_list(one, int, float, type(None)) and len(one) == classes for one in values)
    return numbers and known and isinstance(block.get("boundary", {}), Mapping)


def _is_bands(bands: object, classes: int) -> bool:
    if not isinstance(bands, Mapping):
        return False
    of_class, values = bands.get("of_class"), [bands[band] for band in _BANDS if band in bands]
    numbers = all(isinstance(one, Mapping) and all(map(_may_be_number, one.values())) for one in values)
    return numbers and _is_list(of_class, str, type(None)) and len(of_class or []) == classes


def _is_picture(picture: Mapping[str, Any]) -> bool:
    views = picture.get("views")
    return (
        isinstance(picture.get("key"), str)
        and _may_be_number(picture.get("score"))
        and _is_list(views, dict)
        and all(isinstance(view.get(key), str) for view in views or [] for key in ("title", "file"))
    )


def _is_confusion(one: Mapping[str, Any], classes: int) -> bool:
    labels = [one.get("truth"), one.get("predicted")]
    counted = _is_number(one.get("share")) and _is_count(one.get("pixels"))
    return counted and all(isinstance(label, int) and 0 <= label < classes for label in labels)


def _has(block: object, names: Sequence[str]) -> bool:
    return isinstance(block, Mapping) and all(name in block and _may_be_number(block[name]) for name in names)


def _is_list(value: object, *kinds: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kinds) for one in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _may_be_number(value: object) -> bool:
    return value is None or _is_number(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
