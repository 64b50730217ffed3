"""ADE20K SceneParse150: one 8-bit map an image, 1 to 150 are classes and 0 is everything else, which is ignored.

SRC/images/SPLIT/*.jpg, SRC/annotations/SPLIT/*.png; SPLIT is training or validation (`all`: no folder below).
"""

from __future__ import annotations

from pathlib import Path

from data_tools.formats.label_maps import payload_values, semantic_source
from data_tools.formats.pairs import IMAGES, MAPS, by_stem, paired_records, require
from data_tools.record import FormatSource
from mf_scale.data.ids import IdMeaning
from mf_scale.vocabulary import Vocabulary

VOCABULARY = "ade20k_150.json"
IDS = IdMeaning(ignore=(0,))
LAYOUT = "images/SPLIT and annotations/SPLIT, SPLIT being training or validation (all: the folders themselves)"


def split_folder(folder: Path, part: str, split: str) -> Path:
    """Folder of one part (images, annotations, …) of a split; UserError where it is missing."""
    return require(folder / part / split if split != "all" else folder / part, LAYOUT)


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Pair images and maps; UserError naming those that stand alone."""
    images = by_stem([split_folder(folder, "images", split)], IMAGES)
    maps = by_stem([split_folder(folder, "annotations", split)], MAPS)
    return semantic_source(vocabulary, paired_records(images, maps, where=folder), payload_values, IDS)
