"""Folder: images, label maps of the same names, and a file that says what their values are.

SRC/images[/SPLIT]/NAME.jpg|png|webp, SRC/labels[/SPLIT]/NAME.png (split `all`: the folders themselves), and one of
- SRC/classes.json: a vocabulary (name, classes with name, thing and source_id) and, if needed, "ids" (`ignore`,
  `background`, `offset`) and "encoding": "values" (palette or grey, 8 or 16 bits), "rgb" (id = R + 256 G + 65536 B) or
  "colors" (each class has "color": [R, G, B] in place of source_id; so may `ignore` and `background` list colours);
- SRC/classes.txt: a name a line, numbered from 0, or every line `id:name`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.formats.label_maps import payload_codes, payload_values, semantic_source
from data_tools.formats.names import MALFORMED
from data_tools.formats.pairs import IMAGES, MAPS, by_stem, paired_records, require
from data_tools.record import FormatSource
from mf_scale.data.ids import IdMeaning
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

LAYOUT = "images[/SPLIT], labels[/SPLIT] and classes.json or classes.txt; --split all if there are no splits"
LONGEST_ID = 20
"""Digits of an id; Python refuses to read numbers of thousands."""
READERS = {"values": payload_values, "rgb": payload_codes, "colors": payload_codes}


def open_source(folder: Path, split: str, vocabulary: Vocabulary | None = None) -> FormatSource:
    """Read the classes and pair images and maps; UserError naming what stands alone or cannot be read."""
    if vocabulary is not None:
        raise UserError(
            "this format reads its classes from the folder", where=str(folder), remedy="Put them into classes.json."
        )
    listing = folder / "classes.json"
    if not listing.is_file():
        listing = require(folder / "classes.txt", LAYOUT)
    classes, ids, encoding = _from_json(listing) if listing.suffix == ".json" else _from_text(listing)
    images, maps = (
        by_stem([require(folder / part / split if split != "all" else folder / part, LAYOUT)], suffixes)
        for part, suffixes in (("images", IMAGES), ("labels", MAPS))
    )
    records = paired_records(images, maps, where=folder)
    return semantic_source(classes, records, READERS[encoding], ids, [listing])


def _from_json(path: Path) -> tuple[Vocabulary, IdMeaning, str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it is not an object")
        encoding = data.get("encoding", "values")
        if encoding not in READERS:
            raise ValueError(f"encoding {encoding!r} is none of {', '.join(READERS)}")
        ids = data.get("ids", {})
        if encoding == "colors":
            data = {**data, "classes": [{**c, "source_id": _code(c["color"])} for c in data["classes"]]}
            ids = {what: [_code(value) for value in listed] for what, listed in ids.items()}
    except MALFORMED as error:
        raise UserError(
            f"the classes cannot be read: {type(error).__name__} {error}",
            where=str(path),
            remedy='Give {"name": …, "classes": [{"name": …, "thing": …, "source_id": …}], "ids": {"ignore": [255]}}.',
        ) from error
    return Vocabulary.from_dict(data, where=str(path)), IdMeaning.from_dict(ids, where=str(path)), encoding


def _code(colour: Any) -> int:
    """[R, G, B] -> R + 256 G + 65536 B; ValueError where it is no colour."""
    if not isinstance(colour, list) or len(colour) != 3 or not all(c in range(256) for c in colour):
        raise ValueError(f"{colour!r} is no [R, G, B] of 0 to 255")
    return int(colour[0] + 256 * colour[1] + 65536 * colour[2])


def _from_text(path: Path) -> tuple[Vocabulary, IdMeaning, str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"the classes are not text: {error}", where=str(path)) from error
    heads = [line.partition(":")[0].strip() for line in lines]
    numbered = bool(lines) and all(
        ":" in line and head.isdecimal() and len(head) < LONGEST_ID for line, head in zip(lines, heads, strict=True)
    )
    classes: list[Mapping[str, Any]] = [
        {
            "name": line.partition(":")[2].strip() if numbered else line,
            "thing": False,
            "source_id": int(head) if numbered else place,
        }
        for place, (line, head) in enumerate(zip(lines, heads, strict=True))
    ]
    if not all(c["name"] for c in classes) or not classes:
        raise UserError(
            "the classes cannot be read: a name is missing", where=str(path), remedy="Write `id:name` or a name a line."
        )
    return Vocabulary.from_dict({"name": path.parent.name, "classes": classes}, where=str(path)), IdMeaning(), "values"
