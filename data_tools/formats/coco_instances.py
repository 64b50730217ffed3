"""COCO instances: polygons, or run lengths for crowds; 80 things that may overlap. Needs pycocotools.

SRC/annotations/instances_{split}.json, SRC/{split}/*.jpg

Instances that overlap go to different layers, the smaller to the lower one, so that none loses a pixel. Pixels without
an instance are unlabelled. An image without annotations is a sample too.
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

VOCABULARY = "coco_things_80.json"


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Read and check the lists of a split; UserError naming everything that does not fit."""
    listing = folder / "annotations" / f"instances_{split}.json"
    check_parts((listing, folder / split), "COCO instances need annotations/instances_SPLIT.json and SPLIT/.")
    need_pycocotools("COCO instances")
    try:
        data = load_list(listing)
        records, notes = shape_records([data], folder, lambda entry: f"{split}/{entry['file_name']}", vocabulary)
    except MALFORMED as error:
        raise UserError(
            f"the annotation file is not COCO instances: {type(error).__name__} {error}", where=str(listing)
        ) from error
    return FormatSource(vocabulary, records, annotate, fingerprint([listing]), "instance", notes=notes)


def annotate(record: Record) -> Annotation:
    """Instances of a record on layers; BadRecord for shapes that are none."""
    shapes, notes = runs_in(record)
    layers = layered(shapes, record.payload.size)
    return Annotation(np.stack(layers.maps), layers.segments, record.payload.federated, notes)
