"""Preview: a contact sheet of samples, each as image and as coloured segments with their class names."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.source import open_reader
from mf_scale.data.decode import StoredSample, none_value
from mf_scale.data.index import Index
from mf_scale.data.targets import flatten_layers
from mf_scale.errors import UserError

TILE = 320
"""Width and height of a tile, pixels."""
COLUMNS = 2
"""Samples in a row; each takes two tiles."""
NAMED_SHARE = 0.004
"""Segments smaller than this share of the image get a colour but no name."""


def draw_sheet(source: str, picture: Path, *, count: int) -> int:
    """Write a PNG of `count` >= 1 samples spread evenly over the source; returns how many it shows."""
    if picture.suffix.lower() != ".png":
        raise UserError("the preview is a PNG", where=str(picture), remedy="Give a name that ends in .png.")
    index = Index.open(source)
    reader = open_reader(index)
    ids = np.unique(np.linspace(0, index.samples - 1, min(count, index.samples)).round().astype(int))
    rows = -(-len(ids) // COLUMNS)
    sheet = Image.new("RGB", (2 * COLUMNS * TILE, rows * TILE), "white")
    for place, sample_id in enumerate(ids):
        sample, _ = reader.load(int(sample_id))
        left, top = place % COLUMNS * 2 * TILE, place // COLUMNS * TILE
        image = Image.fromarray(sample.image)
        image.thumbnail((TILE - 4, TILE - 4))
        sheet.paste(image, (left, top))
        sheet.paste(draw_segments(sample, index.vocabulary.names, image.size), (left + TILE, top))
    sheet.save(picture)
    return len(ids)


def draw_segments(sample: StoredSample, names: list[str], size: tuple[int, int]) -> Image.Image:
    """The segments of a sample in colours over its image, with names; black where there is none."""
    stored = flatten_layers(sample.stored_map, none_value(sample.stored_map.dtype))[0]
    count = len(sample.labels)
    colours = np.zeros((none_value(stored.dtype) + 2, 3), np.uint8)
    colours[:count] = [segment_colour(int(label), i) for i, label in enumerate(sample.labels)]
    blend = (0.65 * colours[stored] + 0.35 * sample.image).astype(np.uint8)
    blend[stored >= count] = 0
    drawn = Image.fromarray(blend).resize(size)
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(11)
    scale = size[0] / stored.shape[1]
    for i in np.flatnonzero(np.bincount(stored.ravel(), minlength=count)[:count] > NAMED_SHARE * stored.size):
        rows, columns = np.nonzero(stored == i)
        middle = len(rows) // 2
        nearest = np.argmin(np.abs(rows - rows[middle]) + np.abs(columns - np.median(columns)))
        name = names[sample.labels[i]] + (" (crowd)" if sample.crowd[i] else "")
        at = int(columns[nearest] * scale), int(rows[nearest] * scale)
        pen.text(at, name, fill="white", stroke_fill="black", stroke_width=2, font=font, anchor="mm")
    return drawn


def segment_colour(label: int, number: int) -> tuple[int, int, int]:
    """A hue for the class, varied a little from segment to segment."""
    hue = (label * 0.618034 + 0.03 * (number % 5)) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.09 * (number % 5), 0.95)
    return int(255 * red), int(255 * green), int(255 * blue)
