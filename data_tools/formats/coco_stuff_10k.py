"""COCO-Stuff-10k, release 1.1: one MATLAB file an image with a map of class ids (1-182, 0 unlabelled). Needs scipy.

SRC/imageLists/{split}.txt (a name a line), SRC/images/NAME.jpg, SRC/annotations/NAME.mat (variable S)

Release 1.0 numbers its classes otherwise; its ids do not fit and are refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.formats.coco_lists import check_parts
from data_tools.formats.label_maps import semantic_source
from data_tools.formats.mat_files import read_matrix
from data_tools.formats.names import file_names, sample_key
from data_tools.problems import Problems
from data_tools.record import FormatSource, Record
from mf_scale.data.ids import IdMeaning
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

VOCABULARY = "coco_stuff_171.json"
IDS = IdMeaning(background=(0,))


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Read and check the list of a split; UserError naming everything that does not fit."""
    listing, images, maps = folder / "imageLists" / f"{split}.txt", folder / "images", folder / "annotations"
    check_parts(
        (listing, images, maps), "COCO-Stuff-10k needs imageLists/{train,test}.txt, images/ and annotations/ with .mat."
    )
    try:
        names = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"the list of images is no text: {error}", where=str(listing)) from error
    return semantic_source(vocabulary, _records(names, images, maps, str(listing)), stored_map, IDS, [listing])


def _records(names: list[str], images: Path, maps: Path, where: str) -> list[Record]:
    problems = Problems()
    have_images, have_maps = file_names(images), file_names(maps)
    records: dict[str, Record] = {}
    for name in names:
        key = sample_key(name)
        if key in records:
            problems.add("images listed twice, or whose names give the same key", name)
        for what, have, file in (("images", have_images, f"{name}.jpg"), ("maps", have_maps, f"{name}.mat")):
            if file not in have:
                problems.add(f"missing {what}", file)
        records[key] = Record(key, images / f"{name}.jpg", {"file": f"{name}.jpg"}, maps / f"{name}.mat")
    problems.refuse(
        f"{len(problems)} things are wrong in the list",
        where=where,
        remedy="Repair these entries or take them out; nothing was packed.",
    )
    return list(records.values())


def stored_map(record: Record) -> np.ndarray:
    """Class ids of a record, integer [H,W]. Raises BadRecord."""
    return read_matrix(record.payload, "S")
