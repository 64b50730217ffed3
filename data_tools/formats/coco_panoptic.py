"""COCO panoptic: one json, one RGB PNG an image whose colour is the segment id (R + 256 G + 65536 B, 0 unlabelled).

SRC/annotations/panoptic_{split}.json, SRC/annotations/panoptic_{split}/*.png, SRC/{split}/*.jpg
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_tools.formats.coco_lists import (
    ORIGIN,
    REMEDY,
    Json,
    check_categories,
    check_parts,
    entries_by_id,
    listed_size,
)
from data_tools.formats.label_maps import read_codes
from data_tools.formats.names import MALFORMED, file_names, sample_key
from data_tools.problems import Problems
from data_tools.record import Annotation, BadRecord, FormatSource, Record, RecordSegment, fingerprint
from mf_scale.data.batch import NONE
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

VOCABULARY = "coco_panoptic_133.json"


def open_source(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Read and check the lists of a split; UserError naming everything that does not fit."""
    listing = folder / "annotations" / f"panoptic_{split}.json"
    maps, images = listing.with_suffix(""), folder / split
    check_parts(
        (listing, maps, images),
        "COCO panoptic needs annotations/panoptic_SPLIT.json, annotations/panoptic_SPLIT/ and SPLIT/.",
    )
    try:
        data = json.loads(listing.read_text(encoding="utf-8"))
        records = _records(data, images, maps, vocabulary, str(listing))
    except MALFORMED as error:
        raise UserError(
            f"the annotation file is not COCO panoptic: {type(error).__name__} {error}", where=str(listing)
        ) from error
    changes = fingerprint([listing], sorted(r.payload[0] for r in records))
    return FormatSource(vocabulary, records, annotate, changes, "panoptic")


def _records(data: Json, images: Path, maps: Path, vocabulary: Vocabulary, where: str) -> list[Record]:
    problems = Problems()
    check_categories(data, vocabulary, problems)
    entries = entries_by_id([data], problems)
    labels = vocabulary.index_of_source_id()
    have_images, have_maps = file_names(images), file_names(maps)
    records: dict[str, Record] = {}
    for annotation in data["annotations"]:
        entry = entries.get(int(annotation["image_id"]))
        name = str(annotation["file_name"])
        if entry is None:
            problems.add("annotations without an image entry", name)
            continue
        key = sample_key(Path(entry["file_name"]).stem)
        if key in records:
            problems.add("images annotated twice, or whose names give the same key", str(entry["file_name"]))
        if entry["file_name"] not in have_images:
            problems.add(f"missing images in {images}", entry["file_name"])
        if name not in have_maps:
            problems.add(f"missing maps in {maps}", name)
        ids = [int(s["id"]) for s in annotation["segments_info"]]
        if len(set(ids)) != len(ids) or 0 in ids:
            problems.add("images whose segment ids repeat or are 0", key)
        for category in {int(s["category_id"]) for s in annotation["segments_info"]} - labels.keys():
            problems.add(f"category {category}, not in vocabulary {vocabulary.name}", key)
        segments = [
            RecordSegment(label, 0, vocabulary.classes[label].thing, bool(s["iscrowd"]), int(s["id"]))
            for s in annotation["segments_info"]
            if (label := labels.get(int(s["category_id"]))) is not None
        ]
        origin = {k: entry[k] for k in ORIGIN if k in entry}
        size = listed_size(entry, key, problems)
        records[key] = Record(key, images / entry["file_name"], origin, (maps / name, size, segments))
    for image_id in entries.keys() - {int(a["image_id"]) for a in data["annotations"]}:
        problems.add("images without annotation", str(entries[image_id]["file_name"]))
    problems.refuse(f"{len(problems)} things are wrong in the annotations", where=where, remedy=REMEDY)
    return list(records.values())


def annotate(record: Record) -> Annotation:
    """Segment map of a record; BadRecord where the PNG and the list disagree."""
    path, size, segments = record.payload
    colours = read_codes(path)
    if colours.shape != size:
        raise BadRecord("maps whose size is not that of the image entry")
    found, inverse = np.unique(colours, return_inverse=True)
    index = {segment.source_id: i for i, segment in enumerate(segments)}
    if set(found.tolist()) - {0} - index.keys():
        raise BadRecord("maps with ids that segments_info does not list")
    if index.keys() - set(found.tolist()):
        raise BadRecord("maps that lack ids of segments_info")
    table = np.array([index.get(int(colour), NONE) for colour in found], dtype=np.int32)
    return Annotation(table[inverse].reshape(1, *size), segments)
