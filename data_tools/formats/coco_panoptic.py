"""COCO panoptic: one json, one RGB PNG an image whose colour is the segment id (R + 256 G + 65536 B, 0 unlabelled).

SRC/annotations/panoptic_{split}.json, SRC/annotations/panoptic_{split}/*.png, SRC/{split}/*.jpg
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.problems import Problems
from data_tools.record import Annotation, BadRecord, FormatSource, Record, RecordSegment, fingerprint
from mf_scale.data.batch import NONE
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

VOCABULARY = "coco_panoptic_133.json"
REMEDY = "Repair these entries or take them out; nothing was packed."


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Read and check the lists of a split; UserError naming everything that does not fit."""
    listing = folder / "annotations" / f"panoptic_{split}.json"
    maps, images = listing.with_suffix(""), folder / split
    for path in (listing, maps, images):
        if not path.exists():
            raise UserError(
                "a part of the source is missing",
                where=str(path),
                remedy="COCO panoptic needs annotations/panoptic_SPLIT.json, annotations/panoptic_SPLIT/ and SPLIT/.",
            )
    try:
        data = json.loads(listing.read_text(encoding="utf-8"))
        entries = {int(image["id"]): image for image in data["images"]}
        records = _records(data["annotations"], entries, images, maps, vocabulary, str(listing))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the annotation file is not COCO panoptic: {type(error).__name__} {error}", where=str(listing)
        ) from error
    changes = fingerprint([listing], sorted(r.payload[0] for r in records))
    return FormatSource(vocabulary, records, annotate, changes, "panoptic")


def _records(
    annotations: list[dict[str, Any]],
    entries: dict[int, dict[str, Any]],
    images: Path,
    maps: Path,
    vocabulary: Vocabulary,
    where: str,
) -> list[Record]:
    problems = Problems()
    labels = vocabulary.index_of_source_id()
    have_images, have_maps = ({p.name for p in folder.iterdir()} for folder in (images, maps))
    records: dict[str, Record] = {}
    for annotation in annotations:
        entry = entries.get(int(annotation["image_id"]))
        name = str(annotation["file_name"])
        if entry is None:
            problems.add("annotations without an image entry", name)
            continue
        key = re.sub(r"[^A-Za-z0-9_-]", "_", Path(entry["file_name"]).stem)
        if key in records:
            problems.add("images annotated twice", key)
        if entry["file_name"] not in have_images:
            problems.add(f"missing images in {images}", entry["file_name"])
        if name not in have_maps:
            problems.add(f"missing maps in {maps}", name)
        ids = [int(s["id"]) for s in annotation["segments_info"]]
        if len(set(ids)) != len(ids) or 0 in ids:
            problems.add("images whose segment ids repeat or are 0", key)
        for category in {int(s["category_id"]) for s in annotation["segments_info"]} - labels.keys():
            problems.add(f"category {category}, not in vocabulary {vocabulary.name}", key)
        origin: dict[str, Any] = {k: entry[k] for k in ("id", "coco_url", "flickr_url", "license") if k in entry}
        size = int(entry["height"]), int(entry["width"])
        segments = [
            RecordSegment(label, 0, vocabulary.classes[label].thing, bool(s["iscrowd"]), int(s["id"]))
            for s in annotation["segments_info"]
            if (label := labels.get(int(s["category_id"]))) is not None
        ]
        records[key] = Record(key, images / entry["file_name"], origin, (maps / name, size, segments))
    for image_id in entries.keys() - {int(a["image_id"]) for a in annotations}:
        problems.add("images without annotation", str(entries[image_id]["file_name"]))
    problems.refuse(f"{len(problems)} things are wrong in the annotations", where=where, remedy=REMEDY)
    return list(records.values())


def annotate(record: Record) -> Annotation:
    """Segment map of a record; BadRecord where the PNG and the list disagree."""
    path, size, segments = record.payload
    try:
        with Image.open(path, formats=("PNG",)) as png:
            pixels = np.asarray(png.convert("RGB")).astype(np.int32)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadRecord(f"maps that do not decode ({error})") from error
    if pixels.shape[:2] != size:
        raise BadRecord("maps whose size is not that of the image entry")
    colours = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
    found, inverse = np.unique(colours, return_inverse=True)
    index = {segment.source_id: i for i, segment in enumerate(segments)}
    if set(found.tolist()) - {0} - index.keys():
        raise BadRecord("maps with ids that segments_info does not list")
    if index.keys() - set(found.tolist()):
        raise BadRecord("maps that lack ids of segments_info")
    table = np.array([index.get(int(colour), NONE) for colour in found], dtype=np.int32)
    return Annotation(table[inverse].reshape(1, *size), segments)
