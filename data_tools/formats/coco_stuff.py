"""COCO-Stuff: instances (polygons or RLE) and stuff (RLE) of the same images, 80 + 91 classes. Needs pycocotools.

SRC/annotations/instances_{split}.json, SRC/annotations/stuff_{split}.json, SRC/{split}/*.jpg

Things lie over stuff. Things that overlap each other go to different layers, the smaller to the lower one, so that
none loses a pixel and the semantic map shows the smaller on top.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.problems import Problems
from data_tools.record import Annotation, BadRecord, FormatSource, Record, RecordSegment, fingerprint
from mf_scale.data.batch import NONE
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

VOCABULARY = "coco_stuff_171.json"
OTHER = 183
"""Stuff class "other": the area of things, which the things themselves describe."""
KINDS = ("instances", "stuff")


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Read and check the lists of a split; UserError naming everything that does not fit."""
    paths = [folder / "annotations" / f"{kind}_{split}.json" for kind in KINDS]
    for path in (*paths, folder / split):
        if not path.exists():
            raise UserError(
                "a part of the source is missing",
                where=str(path),
                remedy="COCO-Stuff needs annotations/instances_SPLIT.json, annotations/stuff_SPLIT.json and SPLIT/.",
            )
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise UserError("COCO-Stuff is read with pycocotools", remedy="pip install pycocotools") from error
    try:
        lists = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        records = _records(lists, folder / split, vocabulary, str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the annotation files are not COCO-Stuff: {type(error).__name__} {error}", where=str(folder)
        ) from error
    return FormatSource(vocabulary, records, annotate, fingerprint(paths), "panoptic")


def _records(lists: list[dict[str, Any]], images: Path, vocabulary: Vocabulary, where: str) -> list[Record]:
    problems = Problems()
    labels = vocabulary.index_of_source_id()
    entries = {int(image["id"]): image for data in lists for image in data["images"]}
    shapes: dict[int, list[tuple[RecordSegment, Any]]] = {image_id: [] for image_id in entries}
    for data in lists:
        for annotation in data["annotations"]:
            image_id, category = int(annotation["image_id"]), int(annotation["category_id"])
            if image_id not in entries:
                problems.add("annotations without an image entry", str(annotation["id"]))
            elif category in labels:
                label = labels[category]
                thing, crowd = vocabulary.classes[label].thing, bool(annotation.get("iscrowd", 0))
                segment = RecordSegment(label, 0, thing, crowd, int(annotation["id"]))
                shapes[image_id].append((segment, annotation["segmentation"]))
            elif category != OTHER:
                problems.add(f"category {category}, not in vocabulary {vocabulary.name}", str(annotation["id"]))
    have = {path.name for path in images.iterdir()}
    records: dict[str, Record] = {}
    for image_id, entry in entries.items():
        key = re.sub(r"[^A-Za-z0-9_-]", "_", Path(entry["file_name"]).stem)
        if key in records:
            problems.add("images listed twice", key)
        if entry["file_name"] not in have:
            problems.add(f"missing images in {images}", entry["file_name"])
        origin: dict[str, Any] = {k: entry[k] for k in ("id", "coco_url", "flickr_url", "license") if k in entry}
        size = int(entry["height"]), int(entry["width"])
        records[key] = Record(key, images / entry["file_name"], origin, (size, shapes[image_id]))
    problems.refuse(
        f"{len(problems)} things are wrong in the annotations",
        where=where,
        remedy="Repair these entries or take them out; nothing was packed.",
    )
    return list(records.values())


def annotate(record: Record) -> Annotation:
    """Segment map of a record: stuff below things, overlapping things on layers; what is wholly hidden is left out."""
    size, shapes = record.payload
    masks = [(segment, _mask(shape, size)) for segment, shape in shapes]
    layers = [np.full(size, NONE, np.int32)]
    numbered: list[RecordSegment] = []
    things = [(segment, mask) for segment, mask in masks if segment.thing and mask.any()]
    for segment, mask in sorted(things, key=lambda pair: int(pair[1].sum())):
        free = (i for i, layer in enumerate(layers) if not (layer[mask] != NONE).any())
        place = next(free, len(layers))
        if place == len(layers):
            layers.append(np.full(size, NONE, np.int32))
        layers[place][mask] = len(numbered)
        numbered.append(RecordSegment(segment.label, place, True, segment.crowd, segment.source_id))
    covered = np.stack([layer != NONE for layer in layers]).any(axis=0)
    for segment, mask in ((s, m & ~covered) for s, m in masks if not s.thing):
        if mask.any():
            covered |= mask  # stuff does not overlap in COCO-Stuff; where it did, the first keeps the pixel
            layers[0][mask] = len(numbered)
            numbered.append(segment)
    return Annotation(np.stack(layers), numbered)


def _mask(shape: Any, size: tuple[int, int]) -> np.ndarray:
    """Polygons, or run lengths packed or as a list -> bool [H,W]."""
    from pycocotools import mask as rle

    try:
        if isinstance(shape, list):
            packed = rle.merge(rle.frPyObjects(shape, *size))
        elif isinstance(shape["counts"], list):
            packed = rle.frPyObjects(shape, *size)
        else:
            packed = shape
        mask = rle.decode(packed).astype(bool)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise BadRecord("shapes that are neither polygons nor run lengths") from error
    if mask.shape != size:
        raise BadRecord("masks whose size is not that of the image entry")
    return mask
