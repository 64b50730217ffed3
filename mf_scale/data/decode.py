"""Decode: members of a sample -> uint8 image and segment map as stored. Strict: whatever is doubtful is a BadSample.

On disk a map is an 8-bit (or 16-bit) PNG of segment indices whose two top values are reserved:
NONE = max - 1 and IGNORE = max. It keeps this form until the crop is taken; `targets` makes batch values of it.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mf_scale.data.samples import BadSample, RawSample

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, EOFError, Image.DecompressionBombError)
"""What Pillow raises on broken or oversized files."""


@dataclass(frozen=True)
class StoredSample:
    """A decoded sample with its map in disk values."""

    key: str
    image: np.ndarray
    """uint8 [H,W,3], RGB, in the raw orientation of the file (annotations are made on it)."""
    stored_map: np.ndarray
    """uint8 or uint16 [L,H,W]."""
    labels: np.ndarray
    """int64 [T]."""
    segment_layer: np.ndarray
    """int64 [T]."""
    crowd: np.ndarray
    """bool [T]."""


def none_value(dtype: np.dtype) -> int:
    """Disk value of NONE; the one above it is IGNORE."""
    return int(np.iinfo(dtype).max) - 1


def decode_sample(raw: RawSample, num_classes: int, max_pixels: int) -> StoredSample:
    """Decode and check a sample; BadSample with the reason where anything does not fit."""
    try:
        size = int(raw.meta["height"]), int(raw.meta["width"])
        segments = [(int(s["label"]), int(s["layer"]), bool(s["crowd"])) for s in raw.meta["segments"]]
    except (KeyError, TypeError, ValueError) as error:
        raise BadSample(f"its json lacks a field or has a wrong one: {type(error).__name__} {error}") from error
    table = np.array(segments, dtype=np.int64).reshape(-1, 3)
    wrong = table[(table[:, 0] < 0) | (table[:, 0] >= num_classes), 0]
    if wrong.size:
        raise BadSample(f"label {wrong[0]} is outside the vocabulary of {num_classes} classes")
    layers = len(raw.maps)
    if ((table[:, 1] < 0) | (table[:, 1] >= layers)).any():
        raise BadSample(f"a segment lies on a layer that is not there (the map has {layers})")
    image = decode_image(raw.image, max_pixels, size)
    maps = [decode_map(png, size) for png in raw.maps]
    if len({m.dtype for m in maps}) > 1:
        raise BadSample("its map layers differ in depth")
    stored = maps[0][None] if layers == 1 else np.stack(maps)
    if ((stored >= len(table)) & (stored < none_value(stored.dtype))).any():
        raise BadSample(f"its map holds a segment that its json does not list ({len(table)} segments)")
    return StoredSample(raw.key, image, stored, table[:, 0], table[:, 1], table[:, 2].astype(bool))


def decode_image(data: bytes, max_pixels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Image file -> uint8 [H,W,3] RGB. The header's size is checked before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            _check_size(image, size, max_pixels, "image")
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UNREADABLE as error:
        raise BadSample(f"its image does not decode: {error}") from error


def decode_map(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """PNG of one map layer -> uint8 or uint16 [H,W]."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            _check_size(image, size, size[0] * size[1], "segment map")
            if image.mode not in ("L", "I;16", "I"):
                raise BadSample(f"its segment map is a PNG of mode {image.mode}, not grey")
            pixels = np.asarray(image)
    except UNREADABLE as error:
        raise BadSample(f"its segment map does not decode: {error}") from error
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16, copy=False)


def _check_size(image: Image.Image, size: tuple[int, int] | None, max_pixels: int, what: str) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample(f"its {what} has {width}x{height} pixels, above the limit of {max_pixels}")
    if size is not None and (height, width) != size:
        raise BadSample(f"its {what} is {width}x{height}, its json says {size[1]}x{size[0]}")
