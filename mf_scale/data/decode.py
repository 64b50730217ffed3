"""Decode: members of a sample -> uint8 image and segment map as stored. Strict: whatever is doubtful is a BadSample.

On disk a map is an 8-bit (or 16-bit) PNG of segment indices whose two top values are reserved:
NONE = max - 1 and IGNORE = max. It keeps this form until the crop is taken; `targets` makes batch values of it.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.ids import UNKNOWN
from mf_scale.data.samples import BadSample, RawSample

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
JPEG = b"\xff\xd8\xff"
"""The first bytes of every JPEG."""
PNG, PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24
"""The first bytes of every PNG, and the byte that says its bits a pixel."""
MOST_SEGMENTS = 1 << 15
"""Of one sample: the maps of a batch are int16, with negative values for what is no segment."""
LABEL_VALUES = 1 << 16
"""Values that a grey PNG of labels can hold."""
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, EOFError, Image.DecompressionBombError)
"""What Pillow raises on broken or oversized files."""


@dataclass(frozen=True)
class Federated:
    """Of an image of which only some classes were looked for (LVIS): what is known beyond its segments."""

    negative: np.ndarray
    """int64: classes that were looked for and are not there."""
    not_exhaustive: np.ndarray
    """int64: classes of which not every instance is marked."""


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
    federated: Federated | None = None
    """None: every class of the vocabulary was looked for."""


def none_value(dtype: np.dtype) -> int:
    """Disk value of NONE; the one above it is IGNORE."""
    return int(np.iinfo(dtype).max) - 1


def stack_layers(layers: list[np.ndarray]) -> np.ndarray:
    """[h,w] arrays -> [L,h,w]; a single one is not copied."""
    return layers[0][None] if len(layers) == 1 else np.stack(layers)


def decode_sample(raw: RawSample, num_classes: int, max_pixels: int, table: np.ndarray | None = None) -> StoredSample:
    """Decode and check a sample; BadSample with the reason where anything does not fit.

    With `table` (IdMeaning.table of LABEL_VALUES) the map holds label values: one segment a class present.
    """
    if table is not None:
        return _decode_labelled(raw, max_pixels, table)
    try:
        size = int(raw.meta["height"]), int(raw.meta["width"])
        segments = [(int(s["label"]), int(s["layer"]), bool(s["crowd"])) for s in raw.meta["segments"]]
        listed = np.array(segments, dtype=np.int64).reshape(-1, 3)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadSample(f"its json lacks a field or has a wrong one: {type(error).__name__} {error}") from error
    wrong = listed[(listed[:, 0] < 0) | (listed[:, 0] >= num_classes), 0]
    if wrong.size:
        raise BadSample(f"label {wrong[0]} is outside the vocabulary of {num_classes} classes")
    layers = len(raw.maps)
    if ((listed[:, 1] < 0) | (listed[:, 1] >= layers)).any():
        raise BadSample(f"a segment lies on a layer that is not there (the map has {layers})")
    image = decode_image(raw.image, max_pixels, size)
    maps = [decode_map(png, size) for png in raw.maps]
    if len({m.dtype for m in maps}) > 1:
        raise BadSample("its map layers differ in depth")
    stored = stack_layers(maps)
    none, known = none_value(stored.dtype), len(listed)
    most = min(none, MOST_SEGMENTS)
    if known > most:
        raise BadSample(f"its json lists {known} segments, a map of {stored.itemsize * 8} bits holds {most} at most")
    if known < none and (stored - stored.dtype.type(known)).min() < none - known:  # indices below `known` wrap around
        raise BadSample(f"its map holds a segment that its json does not list ({len(listed)} segments)")
    federated = _federated(raw.meta.get("federated"), num_classes)
    return StoredSample(raw.key, image, stored, listed[:, 0], listed[:, 1], listed[:, 2].astype(bool), federated)


def _federated(said: Any, num_classes: int) -> Federated | None:
    if said is None:
        return None
    try:
        lists = [np.array([int(k) for k in said[name]], np.int64) for name in ("negative", "not_exhaustive")]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadSample(f"its lists of classes looked for are malformed: {type(error).__name__} {error}") from error
    for labels in lists:
        if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
            raise BadSample(f"its lists of classes looked for leave the vocabulary of {num_classes} classes")
    return Federated(*lists)


def _decode_labelled(raw: RawSample, max_pixels: int, table: np.ndarray) -> StoredSample:
    """Image and label values -> the segments of the classes present, in the order of the labels."""
    image = decode_image(raw.image, max_pixels)
    values = decode_map(raw.maps[0], image.shape[:2])
    counts = np.bincount(values.reshape(-1), minlength=len(table))
    present = np.flatnonzero(counts)
    meanings = table[present]
    unknown = present[meanings == UNKNOWN]
    if unknown.size:
        raise BadSample(
            f"its label map holds the value {unknown[0]} ({counts[unknown[0]]} pixels), which is neither a class nor "
            "declared as ignore or background"
        )
    labels = np.unique(meanings[meanings >= 0]).astype(np.int64)
    dtype = np.dtype(np.uint8 if len(labels) <= none_value(np.dtype(np.uint8)) else np.uint16)
    stored_of = np.zeros(len(table), dtype)
    stored_of[present] = np.searchsorted(labels, meanings)
    stored_of[present[meanings == NONE]] = none_value(dtype)
    stored_of[present[meanings == IGNORE]] = none_value(dtype) + 1
    nothing = np.zeros(len(labels), np.int64)
    return StoredSample(raw.key, image, np.take(stored_of, values)[None], labels, nothing, nothing.astype(bool))


def decode_image(data: bytes, max_pixels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Image file -> uint8 [H,W,3] RGB: alpha is dropped, 16 bits become their upper 8, EXIF turns nothing.

    The header's size is checked before any pixel is decoded.
    """
    if data[:3] == JPEG:
        image = _decode_jpeg(data, max_pixels, size)
        if image is not None:
            return image
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as file:
            _check_size(file.size, size, max_pixels, "image")
            if file.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
                return np.repeat((np.asarray(file) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            coloured = file.convert("RGBA") if file.mode == "P" else file  # else Pillow warns of a transparent colour
            return np.asarray(coloured if file.mode == "RGB" else coloured.convert("RGB"))
    except UNREADABLE as error:
        raise BadSample(f"its image does not decode: {_said(error)}") from error


def _decode_jpeg(data: bytes, max_pixels: int, size: tuple[int, int] | None) -> np.ndarray | None:
    """The same pixels as Pillow's in three quarters of the time; None for what Pillow has to decide on."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size((width, height), size, max_pixels, "image")
        return None if colours in ("CMYK", "YCCK") else simplejpeg.decode_jpeg(data)
    except ValueError:  # libjpeg warned of something; Pillow forgives what leaves the image whole
        return None


def decode_map(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """PNG of map or label values, grey or palette indices -> uint8 or uint16 [H,W]."""
    pixels = plain_map(data, size)
    if pixels is not None:
        return pixels
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            _check_size(image.size, size, size[0] * size[1], "segment map")
            if image.mode not in ("1", "L", "P", "I;16", "I"):
                raise BadSample(f"its segment map is a PNG of mode {image.mode}, not grey")
            pixels = np.asarray(image)
    except UNREADABLE as error:
        raise BadSample(f"its segment map does not decode: {_said(error)}") from error
    depth = data[PNG_DEPTH]
    if image.mode == "L" and depth < 8:  # Pillow spreads these values over 0 to 255
        return pixels // (255 // ((1 << depth) - 1))
    return pixels.astype(np.uint8 if depth <= 8 else np.uint16, copy=False)


def plain_map(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """The same for an 8-bit grey PNG without row filters, as packing writes it, in half the time; else None."""
    height, width = size
    chunks = list(_png_chunks(data)) or [(b"", b"")]
    grey = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    if [chunks[0], chunks[-1]] != [(b"IHDR", grey), (b"IEND", b"")] or {kind for kind, _ in chunks[1:-1]} != {b"IDAT"}:
        return None
    inflate, expected = zlib.decompressobj(), height * (width + 1)
    try:
        rows = inflate.decompress(b"".join(content for _, content in chunks[1:-1]), expected + 1)
    except zlib.error:
        return None
    if len(rows) != expected or not inflate.eof:
        return None
    pixels = np.frombuffer(rows, np.uint8).reshape(height, width + 1)
    return None if pixels[:, 0].any() else np.ascontiguousarray(pixels[:, 1:])


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of each chunk. Their checksums are left alone: zlib's own covers the pixels."""
    at = len(PNG) if data.startswith(PNG) else len(data)
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : end]
        at = end + 4


def _said(error: BaseException) -> str:
    """Pillow names the object in memory that it did not recognise, another one in every run."""
    return "it is of no kind that is read" if isinstance(error, UnidentifiedImageError) else str(error)


def _check_size(found: tuple[int, int], size: tuple[int, int] | None, max_pixels: int, what: str) -> None:
    width, height = found
    if width * height > max_pixels:
        raise BadSample(f"its {what} has {width}x{height} pixels, above the limit of {max_pixels}")
    if size is not None and (height, width) != size:
        raise BadSample(f"its {what} is {width}x{height}, its json says {size[1]}x{size[0]}")
