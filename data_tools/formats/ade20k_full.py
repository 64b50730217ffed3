"""ADE20K-Full, the release of 2021: objects of open vocabulary with parts; 847 classes are trained on.

SRC/images/ADE/{training,validation}/**/NAME.jpg, NAME_seg.png, NAME.json (latin-1)

The colour of NAME_seg.png says class and object: name_ndx = R // 10 * 256 + G, and B is the object's number in the
image. A thing's object is a segment, the objects of a stuff class are one. Objects outside the vocabulary are
unlabelled. Parts lie in maps of their own (NAME_parts_N.png) and are not read. The json tells how many objects there
are: the map cannot show one that others cover, nor keep apart two of a class with the same number.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data_tools.formats.colours import read_colours
from data_tools.formats.label_maps import segments_of
from data_tools.formats.names import MALFORMED, check_name, sample_key
from data_tools.problems import Problems
from data_tools.record import Annotation, BadRecord, FormatSource, Record, fingerprint
from mf_scale.data.batch import NONE
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

VOCABULARY = "ade20k_full_847.json"
SPLITS = {"train": "training", "val": "validation"}
"""Names of our own for the folders; their own names serve too."""
TENTHS = np.arange(256, dtype=np.int32) // 10 << 16
"""What a red adds to the number of an object, name_ndx * 256 + B."""
OUTSIDE = "objects outside the vocabulary, unlabelled"
UNSEEN = "objects of the json that the map covers or joins with others of their class"
UNLISTED = "objects of the map that the json does not list"


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Find the images of a split; UserError naming those without map or json."""
    top = folder / "images" / "ADE" / SPLITS.get(split, split)
    if split not in {*SPLITS, *SPLITS.values()} or not top.is_dir():
        raise UserError(
            "a part of the source is missing",
            where=str(top),
            remedy="ADE20K-Full needs images/ADE/training/ and images/ADE/validation/; --split is train or val.",
        )
    records = _records(top)
    read = sorted(path for record in records for path in record.payload)
    act = partial(annotate, vocabulary)
    return FormatSource(vocabulary, records, act, fingerprint([], read), "panoptic")


def _records(top: Path) -> list[Record]:
    problems = Problems()
    records: dict[str, Record] = {}
    for where, _, files in os.walk(top):
        have = set(files)
        for name in sorted(name for name in files if name.endswith(".jpg")):
            stem, parent = name.removesuffix(".jpg"), Path(where)
            check_name(str((parent / name).relative_to(top)), problems)
            beside = f"{stem}_seg.png", f"{stem}.json"
            for missing in set(beside) - have:
                problems.add("images without their map or json", str((parent / missing).relative_to(top)))
            key = sample_key(stem)
            if key in records:
                problems.add("images whose names give the same key", str((parent / name).relative_to(top)))
            origin = {"file": (parent / name).relative_to(top.parent).as_posix()}
            records[key] = Record(key, parent / name, origin, tuple(parent / file for file in beside))
    problems.refuse(
        f"{len(problems)} things are wrong in the folders",
        where=str(top),
        remedy="Unpack the release again, or take these images out; nothing was packed.",
    )
    return list(records.values())


def annotate(vocabulary: Vocabulary, record: Record) -> Annotation:
    """Segment map of a record; BadRecord where map or json cannot be read."""
    map_path, json_path = record.payload
    red, green, blue = np.moveaxis(read_colours(map_path), -1, 0)
    if (red % 10).any():
        raise BadRecord("maps with a colour that no class has (its red is no multiple of 10)")
    objects = np.take(TENTHS, red)
    objects |= green * np.int32(1 << 8)
    objects |= blue
    labels = vocabulary.index_of_source_id()
    shown: Counter[int] = Counter()

    def meaning(value: int) -> tuple[int, bool]:
        shown[value >> 8] += 1
        return labels.get(value >> 8, NONE), False

    annotation = segments_of(objects, meaning, vocabulary)
    del shown[0]  # pixels of no object
    return replace(annotation, notes=_notes(shown, _listed(json_path), labels))


def _listed(path: Path) -> Counter[int]:
    """Objects of each name_ndx that the json lists, without parts."""
    try:
        listed = json.loads(path.read_text(encoding="latin-1"), strict=False)["annotation"]["object"]
        return Counter(int(entry["name_ndx"]) for entry in listed if int(entry["parts"]["part_level"]) == 0)
    except MALFORMED as error:
        raise BadRecord(f"jsons that cannot be read ({type(error).__name__} {error})") from error


def _notes(shown: Counter[int], listed: Counter[int], labels: dict[int, int]) -> dict[str, int]:
    """What is told of an image: the map alone says what is trained on, the json is its witness."""
    notes = {
        OUTSIDE: sum(count for name, count in shown.items() if name not in labels),
        UNSEEN: (listed - shown).total(),
        UNLISTED: (shown - listed).total(),
    }
    return {kind: count for kind, count in notes.items() if count}
