"""Pairs: images and label maps in folders, matched by name; whatever stands alone is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_tools.encode import SUFFIXES
from data_tools.formats.names import check_name, sample_key
from data_tools.problems import Problems
from data_tools.record import Record
from mf_scale.errors import UserError

IMAGES = tuple(SUFFIXES)
MAPS = (".png",)
REMEDY = "Repair these files, rename them or take them out; nothing was packed."


def require(path: Path, layout: str) -> Path:
    """The path, which must be there; else UserError with the layout the format needs and what is there instead."""
    if path.exists():
        return path
    beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    there = f"; beside it: {', '.join(beside[:6])}{', …' if len(beside) > 6 else ''}" if beside else ""
    raise UserError(f"a part of the source is missing{there}", where=str(path), remedy=f"The format needs {layout}.")


def by_stem(folders: Iterable[Path], suffixes: tuple[str, ...], ending: str = "") -> dict[str, Path]:
    """Files by their name without suffix and `ending`; UserError where two have the same or one is not UTF-8."""
    found: dict[str, Path] = {}
    problems = Problems()
    for folder in folders:
        for path in folder.iterdir():
            if path.suffix.lower() in suffixes and path.stem.endswith(ending):
                check_name(path.name, problems)
                stem = path.stem.removesuffix(ending)
                if stem in found:
                    problems.add("files of one name", f"{found[stem]} and {path}")
                found[stem] = path
    problems.refuse(f"{len(problems)} files cannot be packed by their names", where="", remedy=REMEDY)
    return found


def paired_records(
    images: Mapping[str, Path],
    maps: Mapping[str, Any],
    *,
    where: Path,
    names: Iterable[str] | None = None,
) -> list[Record]:
    """A record for every image with its map (or maps) as payload, or for every one of `names`.

    UserError naming all that lack a part.
    """
    problems = Problems()
    records: dict[str, Record] = {}
    for name in sorted(images.keys() | maps.keys()) if names is None else names:
        if name not in images:
            problems.add("maps without an image" if names is None else "listed names without an image", name)
        if name not in maps:
            problems.add("images without a map" if names is None else "listed names without a map", name)
        if name not in images or name not in maps:
            continue
        key = sample_key(name)
        if key in records:
            other = records[key].image.stem
            problems.add("names listed twice" if other == images[name].stem else "names with one key", name)
        records[key] = Record(key, images[name], {"file": images[name].name}, maps[name])
    problems.refuse(f"{len(problems)} images and maps do not fit together", where=str(where), remedy=REMEDY)
    if not records:
        raise UserError("no image with a map was found", where=str(where), remedy="Check the folder and --split.")
    return list(records.values())


def listed_records(images: Path, maps: Mapping[str, Any], listing: Path, layout: str) -> list[Record]:
    """A record for every name in a split's list; UserError naming those that lack a part."""
    names = _listed_names(require(listing, layout))
    return paired_records(by_stem([require(images, layout)], IMAGES), maps, where=listing, names=names)


def _listed_names(listing: Path) -> list[str]:
    """First word of every line of a split's list."""
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"the list of a split is not text: {error}", where=str(listing)) from error
    return [line.split()[0] for line in lines if line.strip()]
