"""Pascal VOC: maps of classes and of objects, 0 is the background, 255 the border, which is ignored.

SRC (or SRC/VOC2012, SRC/VOCdevkit/VOC2012) with JPEGImages, SegmentationClass, SegmentationObject and
ImageSets/Segmentation/SPLIT.txt. `voc` has the 20 classes as things and leaves the background without a segment;
`voc_semantic` has it as one of 21 classes.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from data_tools.formats.label_maps import changes_of, payload_values, read_values, segments_of, semantic_source
from data_tools.formats.pairs import MAPS, by_stem, listed_records, require
from data_tools.record import Annotation, BadRecord, FormatSource, Record
from mf_scale.data.batch import IGNORE
from mf_scale.data.ids import IdMeaning
from mf_scale.vocabulary import Vocabulary

VOCABULARY = "pascal_voc_20.json"
VOCABULARY_SEMANTIC = "pascal_voc_21.json"
BORDER = 255
IDS = IdMeaning(ignore=(BORDER,), background=(0,))
IDS_SEMANTIC = IdMeaning(ignore=(BORDER,))
LAYOUT = "JPEGImages, SegmentationClass, SegmentationObject and ImageSets/Segmentation/SPLIT.txt"
MOST_APART = 0.01
"""Share of an image's pixels where its two maps may disagree; more is refused."""


def release(folder: Path, year: str) -> Path:
    """Folder of a release: `folder` itself, or VOCyear below it."""
    inside = (folder / year, folder / "VOCdevkit" / year)
    return next((path for path in inside if (path / "JPEGImages").is_dir()), folder)


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Objects; UserError naming what the split lists and is not there."""
    root = release(folder, "VOC2012")
    classes, objects = (by_stem([require(root / f"Segmentation{kind}", LAYOUT)], MAPS) for kind in ("Class", "Object"))
    both = {name: (path, objects[name]) for name, path in classes.items() if name in objects}
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    records = listed_records(root / "JPEGImages", both, listing, LAYOUT)
    maps = [path for record in records for path in record.payload]
    annotate = functools.partial(annotate_objects, vocabulary=vocabulary)
    changes = changes_of(vocabulary, IDS, maps, [listing])
    return FormatSource(vocabulary, records, annotate, changes, "panoptic", IDS, class_values)


def open_semantic(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Classes alone; UserError naming what the split lists and is not there."""
    root = release(folder, "VOC2012")
    maps = by_stem([require(root / "SegmentationClass", LAYOUT)], MAPS)
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    records = listed_records(root / "JPEGImages", maps, listing, LAYOUT)
    return semantic_source(vocabulary, records, payload_values, IDS_SEMANTIC, [listing])


def class_values(record: Record) -> np.ndarray:
    """Class ids, uint8 [H,W]."""
    return read_values(record.payload[0])


def annotate_objects(record: Record, *, vocabulary: Vocabulary) -> Annotation:
    """A segment an object. Pixels where the two maps disagree are ignored; BadRecord where they are many."""
    classes, objects = class_values(record), read_values(record.payload[1])
    if classes.shape != objects.shape or classes.dtype != np.uint8 or objects.dtype != np.uint8:
        raise BadRecord("maps of classes and objects that differ in size or are not 8-bit")
    values = 256 * objects.astype(np.uint16) + classes
    apart, pixels = _apart(values)
    if pixels > MOST_APART * values.size:
        raise BadRecord(f"maps of classes and objects that disagree in more than {MOST_APART:.0%} of the pixels")
    table = IDS.table(vocabulary, 256)

    def meaning(value: int) -> tuple[int, bool]:
        ignored = value in apart or value // 256 == BORDER
        return IGNORE if ignored else int(table[value % 256]), False

    annotation = segments_of(values, meaning, vocabulary)
    if pixels:
        annotation.notes["pixels where the maps of classes and objects disagree, ignored"] = pixels
    return annotation


def _apart(values: np.ndarray) -> tuple[set[int], int]:
    """Values (256 object + class) where one map alone has something, or not its object's main class; their pixels."""
    counts = np.bincount(values.ravel(), minlength=1 << 16).reshape(256, 256)
    wrong = counts > 0
    wrong[0, 0] = wrong[BORDER] = wrong[:, BORDER] = False
    main = counts[1:BORDER, 1:BORDER].argmax(axis=1) + 1
    wrong[np.arange(1, BORDER), main] = False
    return set(np.flatnonzero(wrong).tolist()), int(counts[wrong].sum())
