"""Encode: a record and its annotation -> the members of one sample. The counterpart of mf_scale.data.decode."""

from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np

from data_tools.record import Annotation, BadRecord, Record
from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.decode import decode_image, none_value
from mf_scale.data.samples import BadSample

MAX_PIXELS = 1 << 28
"""A larger image is refused at packing."""
SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
PNG_OPTIONS = [
    cv2.IMWRITE_PNG_COMPRESSION, 9,
    cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT,
    cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE,
]  # fmt: skip
"""Without row filters a map of few values is smaller and decodes 2 to 3 times faster."""


def encode_sample(record: Record, annotation: Annotation) -> dict[str, Any]:
    """Members of a sample for webdataset's writer; BadRecord where image and annotation do not fit."""
    suffix = SUFFIXES.get(record.image.suffix.lower())
    if suffix is None:
        raise BadRecord(f"images that are neither JPEG, PNG nor WebP ({record.image.suffix})")
    data = record.image.read_bytes()
    layers, height, width = annotation.segment_map.shape
    try:
        decode_image(data, MAX_PIXELS, (height, width))
    except BadSample as bad:
        raise BadRecord(f"images that do not decode or have another size ({bad})") from bad
    meta: dict[str, Any] = {
        "height": height,
        "width": width,
        "segments": [vars(segment) for segment in annotation.segments],
        "origin": record.origin,
    }
    if annotation.federated is not None:
        meta["federated"] = annotation.federated
    stored = stored_values(annotation.segment_map, len(annotation.segments))
    maps = {f"seg{layer or ''}.png": encode_map(stored[layer]) for layer in range(layers)}
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":"))
    try:
        record.key.encode()
        return {"__key__": record.key, suffix: data, "json": text.encode(), **maps}
    except UnicodeEncodeError as error:
        raise BadRecord("samples with names or text that cannot be UTF-8") from error


def stored_values(segment_map: np.ndarray, segments: int) -> np.ndarray:
    """Map with NONE and IGNORE -> disk values, 8-bit where 254 segments are enough, else 16-bit."""
    if segments > np.iinfo(np.int16).max:
        raise BadRecord(f"images with more than {np.iinfo(np.int16).max} segments")
    dtype = np.dtype(np.uint8 if segments <= none_value(np.dtype(np.uint8)) else np.uint16)
    stored = segment_map.astype(dtype)
    stored[segment_map == NONE] = none_value(dtype)
    stored[segment_map == IGNORE] = none_value(dtype) + 1
    return stored


def encode_map(stored: np.ndarray) -> bytes:
    """One layer as PNG."""
    done, png = cv2.imencode(".png", stored, PNG_OPTIONS)
    if not done:
        raise BadRecord("segment maps that OpenCV does not encode")
    return png.tobytes()
