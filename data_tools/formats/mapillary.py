"""Mapillary Vistas v1.2 and v2.0: 16-bit instance maps, 256 times the class and the number of the instance.

SRC/SPLIT/images/*.jpg, SRC/SPLIT/VERSION/instances/*.png (v1.2 also without the folder VERSION); SPLIT is training or
validation. Where the release's config is there (SRC/config_VERSION.json, for v1.2 also config.json), it says which
classes have instances, and its names and order must be the vocabulary's. The last class, unlabelled, is ignored.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_tools.formats.label_maps import changes_of, payload_values, segments_of
from data_tools.formats.names import MALFORMED
from data_tools.formats.pairs import IMAGES, MAPS, by_stem, paired_records, require
from data_tools.record import Annotation, FormatSource, Record
from mf_scale.data.ids import IdMeaning
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

VOCABULARY_V12 = "mapillary_v1.2_65.json"
VOCABULARY_V20 = "mapillary_v2.0_123.json"
IDS_V12 = IdMeaning(ignore=(65,))
IDS_V20 = IdMeaning(ignore=(123,))
INSTANCES = 256
"""Numbers of instances a class has room for in a value."""


def open_v12(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Version 1.2, 65 classes; UserError naming images and maps that stand alone."""
    beside = not (folder / split / "v1.2").is_dir() and (folder / split / "instances").is_dir()
    maps = folder / split / "instances" if beside else folder / split / "v1.2" / "instances"
    return _open(folder, split, maps, _configured(vocabulary, folder, ("config_v1.2.json", "config.json")), IDS_V12)


def open_v20(folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Version 2.0, 123 classes; UserError naming images and maps that stand alone."""
    maps = folder / split / "v2.0" / "instances"
    return _open(folder, split, maps, _configured(vocabulary, folder, ("config_v2.0.json",)), IDS_V20)


def _open(folder: Path, split: str, instances: Path, vocabulary: Vocabulary, ids: IdMeaning) -> FormatSource:
    layout = "SPLIT/images and SPLIT/VERSION/instances as in the release, SPLIT being training or validation"
    images = by_stem([require(folder / split / "images", layout)], IMAGES)
    records = paired_records(images, by_stem([require(instances, layout)], MAPS), where=folder)
    annotate = functools.partial(annotate_instances, ids=ids, vocabulary=vocabulary)
    changes = changes_of(vocabulary, ids, [record.payload for record in records])
    return FormatSource(vocabulary, records, annotate, changes, "panoptic", ids, class_values)


def class_values(record: Record) -> np.ndarray:
    """Class ids of an instance map, uint16 [H,W]."""
    return payload_values(record) // INSTANCES


def annotate_instances(record: Record, *, ids: IdMeaning, vocabulary: Vocabulary) -> Annotation:
    """Segments of an instance map; a class of stuff is one segment, whatever its number of instance."""
    table = ids.table(vocabulary, 256)
    return segments_of(payload_values(record), lambda value: (int(table[value // INSTANCES]), False), vocabulary)


def _configured(vocabulary: Vocabulary, folder: Path, names: tuple[str, ...]) -> Vocabulary:
    """The vocabulary with things as the release's config says, if it is there; UserError where the two disagree."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return vocabulary
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        listed = [(str(label["readable"]), bool(label["instances"])) for label in labels]
    except MALFORMED as error:
        raise UserError(f"the config cannot be read: {type(error).__name__} {error}", where=str(path)) from error
    for wanted in vocabulary.classes:
        name = listed[wanted.source_id][0] if wanted.source_id < len(listed) else "no class"
        if name != wanted.name:
            raise UserError(
                f"id {wanted.source_id} is {name!r} in the config and {wanted.name!r} in vocabulary {vocabulary.name}",
                where=str(path),
                remedy="Use the format of the version these maps are, or a --vocabulary that fits.",
            )
    return replace(vocabulary, classes=tuple(replace(c, thing=listed[c.source_id][1]) for c in vocabulary.classes))
