"""Pascal Context on the images of VOC2010: 59 classes from PNGs, or all 459 from the release's MATLAB files.

SRC (or SRC/VOC2010, SRC/VOCdevkit/VOC2010) with JPEGImages and ImageSets/SegmentationContext/SPLIT.txt (or, as in
VOC2010, ImageSets/Main/SPLIT.txt: the same images). `context_59` reads SegmentationClassContext/*.png: 1 to 59, and
0 for everything else, which is ignored. `context_459` reads the variable LabelMap of trainval/*.mat (in SRC or in
the release): 1 to 459, 0 ignored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.formats.label_maps import payload_values, semantic_source
from data_tools.formats.mat_files import read_matrix
from data_tools.formats.pairs import MAPS, by_stem, listed_records, require
from data_tools.formats.voc import release
from data_tools.record import FormatSource, Record
from mf_scale.data.ids import IdMeaning
from mf_scale.vocabulary import Vocabulary

VOCABULARY_59 = "pascal_context_59.json"
VOCABULARY_459 = "pascal_context_459.json"
IDS = IdMeaning(ignore=(0,))
LAYOUT_59 = "JPEGImages, SegmentationClassContext/*.png and ImageSets/SegmentationContext/SPLIT.txt"
LAYOUT_459 = "JPEGImages, trainval/*.mat and ImageSets/Main/SPLIT.txt"


def open_59(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """The 59 classes; UserError naming what the split lists and is not there."""
    root = release(folder, "VOC2010")
    maps = by_stem([require(root / "SegmentationClassContext", LAYOUT_59)], MAPS)
    listing = _listing(root, split)
    records = listed_records(root / "JPEGImages", maps, listing, LAYOUT_59)
    return semantic_source(vocabulary, records, payload_values, IDS, [listing])


def open_459(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """The 459 classes; UserError naming what the split lists and is not there."""
    root = release(folder, "VOC2010")
    inside = root / "trainval"
    maps = by_stem([inside if inside.is_dir() else require(folder / "trainval", LAYOUT_459)], (".mat",))
    listing = _listing(root, split)
    records = listed_records(root / "JPEGImages", maps, listing, LAYOUT_459)
    return semantic_source(vocabulary, records, matrix_values, IDS, [listing])


def matrix_values(record: Record) -> np.ndarray:
    """Class ids of a MATLAB file, integer [H,W]."""
    return read_matrix(record.payload, "LabelMap")


def _listing(root: Path, split: str) -> Path:
    own = root / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    return own if own.is_file() else root / "ImageSets" / "Main" / f"{split}.txt"
