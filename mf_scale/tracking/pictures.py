"""Segments drawn on their image: one colour a class, class names written on the segments, a legend.

Shapes: H W picture, T segments. Pictures are uint8 [H,W,3] RGB.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mf_scale.errors import UserError
from mf_scale.rundir import disk_errors

Picture = NDArray[np.uint8]
LONG_SIDE = 640
"""Pixels of the longer side of a drawn picture."""
EMBEDDED_SIDE = 512
"""Pixels of the longer side of a picture in a page: four stand beside each other."""
SMALLEST_NAMED = 0.004
"""Share of the picture a segment needs to carry its class name."""
_FONT_SIZE = 19
_HUE_STEP = 0.618033988749895
_LIGHTNESS = (0.66, 0.78, 0.56)

_LMS_OF_LAB = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
)
_RGB_OF_LMS = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
)


@dataclass(frozen=True)
class Segmentation:
    """Segments of one image: what there is to draw."""

    segment_map: NDArray[Any]
    """[H,W]: pixel -> index into labels; negative: void."""
    labels: NDArray[Any]
    """[T]: class of each segment."""


@functools.cache
def class_color(label: int) -> tuple[int, int, int]:
    """The colour of a class, RGB: the same in every picture of every run; neighbours in the vocabulary differ."""
    hue = 2 * math.pi * ((label * _HUE_STEP) % 1.0)
    return _oklch(_LIGHTNESS[label % len(_LIGHTNESS)], 0.16, hue)


def draw_segments(image: Picture, segments: Segmentation, names: Sequence[str]) -> Picture:
    """`image` [H,W,3] with its segments in their classes' colours, borders and names; void is greyed out."""
    height, width = _fitted(image.shape[0], image.shape[1])
    photo = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    segment_map = _shrink(segments.segment_map, height, width)
    labels = np.asarray(segments.labels, dtype=np.int64)
    colors = np.array([class_color(int(label)) for label in labels], dtype=np.float32).reshape(-1, 3)
    void = segment_map < 0
    grey = 0.45 * photo.mean(-1, keepdims=True) + 0.25 * 255
    paint = grey.repeat(3, axis=-1)
    paint[~void] = 0.4 * photo[~void] + 0.6 * colors[segment_map[~void]]
    paint[_borders(segment_map)] = 255
    canvas = Image.fromarray(paint.round().clip(0, 255).astype(np.uint8))
    _write_names(canvas, segment_map, labels, names)
    return np.asarray(canvas)


def plain(image: Picture) -> Picture:
    """`image` at the size `draw_segments` draws."""
    height, width = _fitted(image.shape[0], image.shape[1])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def add_legend(picture: Picture, labels: Sequence[int], names: Sequence[str]) -> Picture:
    """`picture` with a strip below that names the colours of `labels`, in columns as wide as the longest name."""
    if not labels:
        return picture
    font, width = _font(_FONT_SIZE), picture.shape[1]
    row, swatch, gap = _FONT_SIZE + 9, _FONT_SIZE, 8
    longest = max(font.getlength(names[label]) for label in labels)
    columns = max(1, int((width - gap) // (swatch + 2 * gap + longest)))
    rows = math.ceil(len(labels) / columns)
    strip = Image.new("RGB", (width, rows * row + 2 * gap), "white")
    draw = ImageDraw.Draw(strip)
    for i, label in enumerate(labels):
        x, y = gap + (i % columns) * (width - gap) / columns, gap + (i // columns) * row
        draw.rounded_rectangle((x, y + 3, x + swatch, y + 3 + swatch), 3, fill=class_color(label))
        draw.text((x + swatch + gap, y + 2), names[label], font=font, fill=(28, 36, 48))
    return np.concatenate([picture, np.asarray(strip)])


def sheet(rows: Sequence[Sequence[Picture]], titles: Sequence[str], gap: int = 10) -> Picture:
    """A contact sheet: one row a sample, one column a view, every picture scaled to one width."""
    width = LONG_SIDE // 2
    columns = len(titles)
    total = columns * width + (columns + 1) * gap
    head = Image.new("RGB", (total, 34), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(head).text((gap + i * (width + gap), 9), title, font=_font(_FONT_SIZE + 1), fill=(28, 36, 48))
    parts = [np.asarray(head)]
    for row in rows:
        heights = [max(1, round(p.shape[0] * width / p.shape[1])) for p in row]
        strip = Image.new("RGB", (total, max(heights) + gap), "white")
        for i, (picture, height) in enumerate(zip(row, heights, strict=True)):
            small = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
            strip.paste(small, (gap + i * (width + gap), 0))
        parts.append(np.asarray(strip))
    return np.concatenate(parts)


def write_png(path: Path, picture: NDArray[Any]) -> None:
    """Write uint8 [H,W,3] or uint16 [H,W] as PNG; the file is whole or not there."""
    ready = np.ascontiguousarray(picture[..., ::-1]) if picture.ndim == 3 else picture
    write_bytes(path, cv2.imencode(".png", ready)[1].tobytes())


def write_class_map(path: Path, classes: NDArray[Any]) -> None:
    """Write the class of each pixel [H,W] (negative: none) as 16-bit PNG of class + 1."""
    write_png(path, (np.maximum(classes, -1) + 1).astype(np.uint16))


def read_png(path: Path) -> Picture:
    """A picture file as uint8 [H,W,3]; raises UserError where it is missing or damaged."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(
            f"a picture of the report cannot be read: {error}", where=str(path), remedy="Evaluate the run again."
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there."""
    host = socket.gethostname().replace("/", "-")[:40]  # of two hosts two processes may have one number
    part = path.with_name(f".{path.name}.{host}.{os.getpid()}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)


def embedded(path: Path) -> str:
    """A picture file as a data: address of a web page, smaller and recompressed (WebP) to some twenty kB."""
    buffer, picture = io.BytesIO(), Image.fromarray(read_png(path))
    picture.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
    picture.save(buffer, "WEBP", quality=78, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _fitted(height: int, width: int) -> tuple[int, int]:
    scale = LONG_SIDE / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _shrink(segment_map: NDArray[Any], height: int, width: int) -> NDArray[np.int64]:
    """The map in another size, pixel by pixel of the nearest centre."""
    rows = (np.arange(height) + 0.5) * segment_map.shape[0] / height
    columns = (np.arange(width) + 0.5) * segment_map.shape[1] / width
    return segment_map[rows.astype(int)[:, None], columns.astype(int)[None]].astype(np.int64)


def _borders(segment_map: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pixels whose right or lower neighbour belongs to another segment."""
    border = np.zeros(segment_map.shape, dtype=bool)
    border[:, :-1] |= segment_map[:, :-1] != segment_map[:, 1:]
    border[:-1] |= segment_map[:-1] != segment_map[1:]
    return border


def _write_names(
    canvas: Image.Image, segment_map: NDArray[np.int64], labels: NDArray[np.int64], names: Sequence[str]
) -> None:
    """Class names in the widest place of each segment, largest first; none over another, none on tiny segments."""
    draw, font = ImageDraw.Draw(canvas), _font(_FONT_SIZE)
    areas = np.bincount(segment_map[segment_map >= 0].ravel(), minlength=len(labels))
    taken: list[tuple[float, float, float, float]] = []
    for segment in np.argsort(-areas, kind="stable"):
        if areas[segment] < SMALLEST_NAMED * segment_map.size:
            break
        name = names[int(labels[segment])]
        x, y = _widest_place(segment_map == segment)
        half_w, half_h = font.getlength(name) / 2 + 5, _FONT_SIZE / 2 + 4
        x = min(max(x, half_w + 1), canvas.width - half_w - 2)
        y = min(max(y, half_h + 1), canvas.height - half_h - 2)
        box = (x - half_w, y - half_h, x + half_w, y + half_h)
        if any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken):
            continue
        taken.append(box)
        draw.rounded_rectangle(box, 5, fill=(20, 24, 32), outline=class_color(int(labels[segment])))
        draw.text((x, y), name, font=font, fill="white", anchor="mm")


def _widest_place(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """(x, y) of the pixel of `mask` that is farthest from its outside; the picture's edge is outside."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x) - 1, float(y) - 1


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib brings it: the same on every machine."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _oklch(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """sRGB of an OKLCH colour (Ottosson 2020): equal lightness looks equally light in every hue."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    lms = (_LMS_OF_LAB @ np.array([lightness, a, b])) ** 3
    linear = (_RGB_OF_LMS @ lms).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (encoded * 255).round().astype(int).tolist()
    return red, green, blue
