"""Which parts of a prediction are done: part-000000.json, written last, is the commit of the files beside it."""

from __future__ import annotations

import re
from pathlib import Path

from mf_scale.errors import UserError
from mf_scale.evaluation.prediction.plan import BOOKS
from mf_scale.evaluation.prediction.words import FILES
from mf_scale.rundir import read_json

COMMIT = re.compile(r"part-(\d{6,})\.json")


def part_name(part: int, ending: str) -> str:
    """A part's file."""
    return f"part-{part:06d}.{ending}"


def books_of(folder: Path, layout: str) -> Path:
    """Where the commits and lines of the parts lie."""
    return folder / BOOKS if layout == FILES else folder


def committed_parts(folder: Path, layout: str) -> set[int]:
    """The parts that are done, by one look at the folder."""
    books = books_of(folder, layout)
    names = {path.name for path in books.iterdir()} if books.is_dir() else set()
    parts = {int(found[1]) for name in names if (found := COMMIT.fullmatch(name))}
    endings = ("jsonl",) if layout == FILES else ("jsonl", "tar")
    return {
        part
        for part in parts
        if all(part_name(part, ending) in names for ending in endings) or is_committed(books, layout, part)
    }


def is_committed(books: Path, layout: str, part: int) -> bool:
    """Whether a part is done: its commit, its lines, and its tar unless every image of it was refused."""
    commit = books / part_name(part, "json")
    if not commit.exists():
        return False
    try:
        counts = read_json(commit)
    except UserError:
        return False
    if not (books / part_name(part, "jsonl")).exists():
        return False
    has_tar = layout == FILES or (books / part_name(part, "tar")).exists()
    return has_tar or counts.get("images") == counts.get("quarantined")
