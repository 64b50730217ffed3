"""Preview: a contact sheet of samples, each as image and as coloured segments with their class names."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.source import open_reader
from mf_scale.data.decode import StoredSample, none_value
from mf_scale.data.index import Index
from mf_scale.data.reader import SampleReader
from mf_scale.data.samples import BadSample
from mf_scale.data.targets import flatten_layers

TILE = 320
"""Width and height of a tile, pixels."""
CAPTION = 18
"""Height of the line with key, shard and number of segments above two tiles."""
COLUMNS = 2
"""Samples in a row; each takes two tiles."""
NAMED_SHARE = 0.004
"""Segments smaller than this share of the image get a colour but no name."""


def draw_sheet(source: str, picture: Path, *, count: int) -> int:
    """Write a PNG of `count` >= 1 samples spread evenly over the source; returns how many it shows."""
    index = Index.open(source)
    reader, font = open_reader(index), name_font()
    ids = np.unique(np.linspace(0, index.samples - 1, min(count, index.samples)).round().astype(int)).tolist()
    rows = [
        [draw_sample(reader, sample_id, font) for sample_id in ids[i : i + COLUMNS]]
        for i in range(0, len(ids), COLUMNS)
    ]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (2 * COLUMNS * TILE, sum(heights)), "white")
    for i, row in enumerate(rows):
        for column, tile in enumerate(row):
            sheet.paste(tile, (2 * TILE * column, sum(heights[:i])))
    sheet.save(picture)
    return len(ids)


def draw_sample(reader: SampleReader, sample_id: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Two tiles under a caption: the image, and its segments; or why the sample does not decode."""
    record = reader.index.sample(sample_id)
    about = f"{record.key}  ({record.shard}, {record.width}x{record.height}, {record.segments} segments)"
    try:
        sample = reader.load_exact(sample_id)
    except BadSample as bad:
        tiles = Image.new("RGB", (2 * TILE, 3 * CAPTION), "white")
        told = fit(f"does not decode: {bad}", font, 2 * TILE - 12)
        ImageDraw.Draw(tiles).text((4, 2 * CAPTION), told, fill="red", font=font, anchor="lm")
    else:
        image = Image.fromarray(sample.image)
        image.thumbnail((TILE - 4, TILE - 4))
        tiles = Image.new("RGB", (2 * TILE, CAPTION + image.height + 4), "white")
        tiles.paste(image, (0, CAPTION))
        tiles.paste(draw_segments(sample, reader.index.vocabulary.names, image.size, font), (TILE, CAPTION))
    place = 4, CAPTION // 2
    ImageDraw.Draw(tiles).text(place, fit(about, font, 2 * TILE - 12), fill="black", font=font, anchor="lm")
    return tiles


def draw_segments(
    sample: StoredSample, names: list[str], size: tuple[int, int], font: ImageFont.FreeTypeFont
) -> Image.Image:
    """The segments of a sample in colours over its image, with names: black where there is none, grey where ignored."""
    none = none_value(sample.stored_map.dtype)
    stored = flatten_layers(sample.stored_map, none)[0]
    count = len(sample.labels)
    colours = np.zeros((none + 2, 3), np.uint8)
    colours[:count] = [segment_colour(int(label), i) for i, label in enumerate(sample.labels)]
    blend = (0.65 * colours[stored] + 0.35 * sample.image).astype(np.uint8)
    blend[stored == none], blend[stored == none + 1] = 0, 128
    drawn = Image.fromarray(blend).resize(size)
    pen = ImageDraw.Draw(drawn)
    scale = size[0] / stored.shape[1]
    areas = np.bincount(stored.ravel(), minlength=count)[:count]
    for i in (i for i in np.argsort(-areas, kind="stable") if areas[i] > NAMED_SHARE * stored.size):
        rows, columns = np.nonzero(stored == i)
        middle = len(rows) // 2
        nearest = np.argmin(np.abs(rows - rows[middle]) + np.abs(columns - np.median(columns)))
        name = names[sample.labels[i]].split(",")[0] + (" (crowd)" if sample.crowd[i] else "")
        half = pen.textlength(name, font=font) / 2 + 3
        x = min(max(columns[nearest] * scale, half), max(size[0] - half, half))
        y = min(max(rows[nearest] * scale, 8), size[1] - 8)
        pen.text((x, y), name, fill="white", stroke_fill="black", stroke_width=2, font=font, anchor="mm")
    return drawn


def name_font() -> ImageFont.FreeTypeFont:
    """A font that has most alphabets, unlike Pillow's own."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), 11)


def fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, its end cut off where it is wider than so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def segment_colour(label: int, number: int) -> tuple[int, int, int]:
    """A hue for the class, varied a little from segment to segment."""
    hue = (label * 0.618034 + 0.03 * (number % 5)) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.09 * (number % 5), 0.95)
    return int(255 * red), int(255 * green), int(255 * blue)
