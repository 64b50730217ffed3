"""ADE20K panoptic: stuff of SceneParse150's maps, things of its instance maps. 100 things, 50 stuff.

SRC/images/SPLIT/*.jpg, SRC/annotations/SPLIT/*.png, SRC/annotations_instance/SPLIT/*.png; SPLIT is training or
validation (`all`: no folder below). An instance map is RGB: R is the thing, counted from 1 among the things of the
vocabulary, G the number of the instance. Instances lie over stuff. Value 0, and things that no instance covers,
belong to no segment (unlabelled).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_tools.formats.ade20k_150 import VOCABULARY, split_folder
from data_tools.formats.label_maps import changes_of, read_codes, read_values, segments_of
from data_tools.formats.pairs import IMAGES, MAPS, by_stem, paired_records
from data_tools.record import Annotation, BadRecord, FormatSource, Record
from mf_scale.data.batch import NONE
from mf_scale.data.ids import IdMeaning
from mf_scale.vocabulary import Vocabulary

__all__ = ["VOCABULARY", "open_source"]
IDS = IdMeaning(background=(0,))
INSTANCES = 1 << 16
"""Added to the values of instances, 256 G + R, to set them apart from classes."""


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Pair images with both maps; UserError naming those that stand alone."""
    images = by_stem([split_folder(folder, "images", split)], IMAGES)
    folders = [split_folder(folder, part, split) for part in ("annotations", "annotations_instance")]
    classes, instances = (paired_records(images, by_stem([maps], MAPS), where=maps) for maps in folders)
    records = [replace(one, payload=(one.payload, two.payload)) for one, two in zip(classes, instances, strict=True)]
    maps = [path for record in records for path in record.payload]
    annotate = functools.partial(annotate_panoptic, vocabulary=vocabulary)
    return FormatSource(vocabulary, records, annotate, changes_of(vocabulary, IDS, maps), "panoptic", IDS, class_values)


def class_values(record: Record) -> np.ndarray:
    """Class ids of SceneParse150, uint8 [H,W]."""
    return read_values(record.payload[0])


def annotate_panoptic(record: Record, *, vocabulary: Vocabulary) -> Annotation:
    """Segments of both maps; BadRecord where they do not fit together or name a thing beyond the vocabulary's."""
    classes, codes = class_values(record), read_codes(record.payload[1])
    if classes.shape != codes.shape:
        raise BadRecord("instance maps that have another size than the map of classes")
    things = [label for label, thing in enumerate(vocabulary.things) if thing]
    kinds, numbers = codes % 256, codes // 256 % 256
    if kinds.max() > len(things):
        raise BadRecord(f"instance maps with thing {kinds.max()}, where the vocabulary has {len(things)}")
    if ((kinds == 0) & (numbers > 0)).any():
        raise BadRecord("instance maps with instances of no class")
    table = IDS.table(vocabulary, 256)
    table[np.isin(table, things)] = NONE
    values = np.where(numbers > 0, INSTANCES + codes % INSTANCES, classes)

    def meaning(value: int) -> tuple[int, bool]:
        return (things[value % 256 - 1] if value >= INSTANCES else int(table[value])), False

    return segments_of(values, meaning, vocabulary)
