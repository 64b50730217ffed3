"""Label maps: image files whose pixel values are ids, read strictly; values -> segments. Shared by their formats."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.encode import MAX_PIXELS
from data_tools.formats.colours import read_colours
from data_tools.record import Annotation, BadRecord, FormatSource, Record, RecordSegment, fingerprint
from mf_scale.data.decode import UNREADABLE
from mf_scale.data.ids import UNKNOWN, IdMeaning
from mf_scale.vocabulary import Vocabulary

BIT_DEPTH = 24
"""Where a PNG's header says how many bits a sample has."""


def read_values(path: Path) -> np.ndarray:
    """Values of a palette or grey PNG: its indices or grey levels, uint8 or uint16 [H,W]. Raises BadRecord."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRecord(f"label maps above the limit of {MAX_PIXELS} pixels")
            if image.mode not in ("P", "L", "1", "I;16", "I"):
                raise BadRecord(f"label maps of mode {image.mode}, which are neither palette nor grey")
            if image.mode in ("L", "1") and data[BIT_DEPTH] < 8:
                raise BadRecord("grey label maps of fewer than 8 bits, which programs scale to 255 or not")
            pixels = np.asarray(image)
    except UNREADABLE as error:
        raise BadRecord(f"label maps that do not decode ({type(error).__name__})") from error
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16)


def read_codes(path: Path) -> np.ndarray:
    """Values of a PNG in colours: R + 256 G + 65536 B, int32 [H,W]. Raises BadRecord."""
    red, green, blue = np.moveaxis(read_colours(path).astype(np.int32), -1, 0)
    return red + 256 * green + 65536 * blue


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that a map [H,W] holds, in order [N], and the place of each pixel's among them [H,W]."""
    if values.dtype.itemsize > 2:
        found, places = np.unique(values, return_inverse=True)
        return found, places.reshape(values.shape)
    found = np.flatnonzero(np.bincount(values.ravel()))
    places = np.zeros(int(found[-1]) + 1, np.int32)
    places[found] = np.arange(len(found))
    return found, places[values]


def segments_of(values: np.ndarray, meaning: Callable[[int], tuple[int, bool]], vocabulary: Vocabulary) -> Annotation:
    """A segment for every value of a thing and for every class of stuff.

    `meaning` says of a value its label (or NONE, IGNORE, UNKNOWN) and whether it is a crowd; BadRecord at UNKNOWN.
    """
    found, places = distinct(values)
    segments: list[RecordSegment] = []
    number_of_stuff: dict[int, int] = {}
    numbers = np.empty(len(found), np.int32)
    for place, value in enumerate(found.tolist()):
        label, crowd = meaning(value)
        if label == UNKNOWN:
            raise BadRecord(f"label maps with value {value}, which no class has and nothing was declared for")
        if label in number_of_stuff:
            numbers[place] = number_of_stuff[label]
        elif label < 0:
            numbers[place] = label
        else:
            numbers[place] = len(segments)
            thing = vocabulary.classes[label].thing
            if not thing:
                number_of_stuff[label] = len(segments)
            segments.append(RecordSegment(label, 0, thing, crowd and thing, value))
    return Annotation(numbers[places][None], segments)


def annotate_values(
    record: Record, *, values: Callable[[Record], np.ndarray], ids: IdMeaning, vocabulary: Vocabulary
) -> Annotation:
    """One segment a class, from a map of class ids."""
    meanings = ids.meanings(vocabulary)
    return segments_of(values(record), lambda value: (meanings.get(value, UNKNOWN), False), vocabulary)


def semantic_source(
    vocabulary: Vocabulary,
    records: list[Record],
    values: Callable[[Record], np.ndarray],
    ids: IdMeaning,
    listings: Iterable[Path] = (),
) -> FormatSource:
    """Source of kind semantic whose records' payload is the path of a map of class ids."""
    annotate = functools.partial(annotate_values, values=values, ids=ids, vocabulary=vocabulary)
    changes = changes_of(vocabulary, ids, [record.payload for record in records], listings)
    return FormatSource(vocabulary, records, annotate, changes, "semantic", ids, values)


def payload_values(record: Record) -> np.ndarray:
    """Values of the map that is a record's payload."""
    return read_values(record.payload)


def payload_codes(record: Record) -> np.ndarray:
    """Colour codes of the map that is a record's payload."""
    return read_codes(record.payload)


def changes_of(
    vocabulary: Vocabulary, ids: IdMeaning, maps: Iterable[Path], listings: Iterable[Path] = (), **more: Any
) -> str:
    """Fingerprint of a source of maps: the maps, its lists, and what an id means."""
    declared = {"ids": ids.to_dict(), "classes": [c.source_id for c in vocabulary.classes], **more}
    files = fingerprint(listings, sorted(maps))
    return hashlib.sha256((files + json.dumps(declared, sort_keys=True)).encode()).hexdigest()
