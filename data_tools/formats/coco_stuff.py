"""COCO-Stuff: instances (polygons or RLE) and stuff (RLE) of the same images, 80 + 91 classes. Needs pycocotools.

SRC/annotations/instances_{split}.json, SRC/annotations/stuff_{split}.json, SRC/{split}/*.jpg

Things lie over stuff. Things that overlap each other go to different layers, the smaller to the lower one, so that
none loses a pixel and the semantic map shows the smaller on top.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.formats.coco_lists import check_parts, load_list, runs_in, shape_records
from data_tools.formats.names import MALFORMED
from data_tools.formats.shapes import layered, need_pycocotools
from data_tools.record import Annotation, FormatSource, Record, fingerprint
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

VOCABULARY = "coco_stuff_171.json"
OTHER = 183
"""Stuff class "other": the area of things, which the things themselves describe."""
KINDS = ("instances", "stuff")
HIDDEN = "stuff that things hide wholly, left out"


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Read and check the lists of a split; UserError naming everything that does not fit."""
    paths = [folder / "annotations" / f"{kind}_{split}.json" for kind in KINDS]
    check_parts(
        (*paths, folder / split),
        "COCO-Stuff needs annotations/instances_SPLIT.json, annotations/stuff_SPLIT.json and SPLIT/.",
    )
    need_pycocotools("COCO-Stuff")
    try:
        lists = [load_list(path) for path in paths]
        records, notes = shape_records(
            lists, folder, lambda entry: f"{split}/{entry['file_name']}", vocabulary, left_out=frozenset([OTHER])
        )
    except MALFORMED as error:
        raise UserError(
            f"the annotation files are not COCO-Stuff: {type(error).__name__} {error}", where=str(folder)
        ) from error
    return FormatSource(vocabulary, records, annotate, fingerprint(paths), "panoptic", notes=notes)


def annotate(record: Record) -> Annotation:
    """Segment map of a record: stuff below things, overlapping things on layers; what is wholly hidden is left out."""
    shapes, notes = runs_in(record)
    layers = layered([pair for pair in shapes if pair[0].thing], record.payload.size)
    covered = layers.covered()
    for segment, runs in (pair for pair in shapes if not pair[0].thing):
        window = runs.window()
        seen = runs.inside(window) & ~covered[window]
        if seen.any():
            covered[window] |= seen  # stuff does not overlap in COCO-Stuff; where it did, the first keeps the pixel
            layers.add(segment, window, seen)
        else:
            notes[HIDDEN] = notes.get(HIDDEN, 0) + 1
    return Annotation(np.stack(layers.maps), layers.segments, notes=notes)
