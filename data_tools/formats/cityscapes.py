"""Cityscapes: 16-bit instance maps (panoptic) or 8-bit maps of label ids (semantic); 19 of the 34 labels are classes.

SRC/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, SRC/gtFine/SPLIT/CITY/*_gtFine_instanceIds.png (or _labelIds.png);
SPLIT is train or val. In an instance map a value of 1000 and above is 1000 times the label id and the number of the
instance; a smaller one is a label id, for a thing a group that was not taken apart: a crowd. Labels outside
evaluation are ignored.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from data_tools.formats.label_maps import changes_of, payload_values, segments_of, semantic_source
from data_tools.formats.pairs import MAPS, by_stem, paired_records, require
from data_tools.record import Annotation, FormatSource, Record
from mf_scale.data.ids import IdMeaning
from mf_scale.vocabulary import Vocabulary

VOCABULARY = "cityscapes_19.json"
IDS = IdMeaning(ignore=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30))
"""Unlabelled, the car itself, borders, and what the benchmark leaves out (parking, caravan, …)."""
LAYOUT = "leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY as in the release, SPLIT being train or val"
INSTANCE = 1000
"""Values from here on are those of single instances."""


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Instances and stuff; UserError naming images and maps that stand alone."""
    records = _records(folder, split, "_gtFine_instanceIds")
    annotate = functools.partial(annotate_instances, vocabulary=vocabulary)
    changes = changes_of(vocabulary, IDS, [record.payload for record in records])
    return FormatSource(vocabulary, records, annotate, changes, "panoptic", IDS, label_ids)


def open_semantic(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Classes alone; UserError naming images and maps that stand alone."""
    return semantic_source(vocabulary, _records(folder, split, "_gtFine_labelIds"), payload_values, IDS)


def _records(folder: Path, split: str, ending: str) -> list[Record]:
    images, maps = (
        by_stem([city for city in sorted(require(folder / part / split, LAYOUT).iterdir()) if city.is_dir()], MAPS, end)
        for part, end in (("leftImg8bit", "_leftImg8bit"), ("gtFine", ending))
    )
    return paired_records(images, maps, where=folder)


def label_ids(record: Record) -> np.ndarray:
    """Label ids of an instance map, integer [H,W]."""
    values = payload_values(record)
    return np.where(values >= INSTANCE, values // INSTANCE, values)


def annotate_instances(record: Record, *, vocabulary: Vocabulary) -> Annotation:
    """Segments of an instance map."""
    values = payload_values(record)
    table = IDS.table(vocabulary, 1 << 16)

    def meaning(value: int) -> tuple[int, bool]:
        return int(table[value // INSTANCE if value >= INSTANCE else value]), value < INSTANCE

    return segments_of(values, meaning, vocabulary)
