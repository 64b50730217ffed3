"""Colour: SSD's jitter as lookup tables, with at most one round trip through HSV."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18
"""SSD's ranges as the paper uses them; hue in steps of OpenCV's circle of 180."""


@dataclass(frozen=True)
class ColorTables:
    """What one draw of the jitter does to a pixel, in this order; None: nothing."""

    before: np.ndarray | None
    """uint8 [256], of red, green and blue."""
    hue: np.ndarray | None
    """uint8 [256]."""
    saturation: np.ndarray | None
    """uint8 [256]."""
    after: np.ndarray | None
    """uint8 [256], of red, green and blue."""


def draw_color(generator: np.random.Generator) -> ColorTables:
    """Brightness, contrast, saturation and hue, each with p 0.5; contrast first or last with p 0.5."""
    applied = generator.random(4) < 0.5
    contrast_first = generator.random() < 0.5
    brightness = generator.uniform(-BRIGHTNESS, BRIGHTNESS) if applied[0] else 0.0
    contrast = generator.uniform(*CONTRAST) if applied[1] else 1.0
    saturation = generator.uniform(*SATURATION) if applied[2] else 1.0
    hue = int(generator.integers(-HUE, HUE + 1)) if applied[3] else 0
    level = np.arange(256, dtype=np.float32)
    before = hue_table = saturation_table = after = None
    if applied[0] or (applied[1] and contrast_first):
        brightened = np.clip(level + brightness, 0, 255)
        before = _clip(brightened * contrast if contrast_first else brightened)
    if applied[2]:
        saturation_table = _clip(level * saturation)
    if applied[3]:
        hue_table = ((np.arange(256) + hue) % 180).astype(np.uint8)
    if applied[1] and not contrast_first:
        after = _clip(level * contrast)
    return ColorTables(before, hue_table, saturation_table, after)


def apply_color(image: np.ndarray, tables: ColorTables) -> np.ndarray:
    """A uint8 RGB image [h,w,3] after the jitter; pixel by pixel, so that any part of an image will do."""
    if tables.before is not None:
        image = cv2.LUT(image, tables.before)
    if tables.hue is not None or tables.saturation is not None:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        for channel, table in enumerate((tables.hue, tables.saturation)):
            if table is not None:  # one channel at a time: a table of all three takes twice as long
                cv2.insertChannel(cv2.LUT(cv2.extractChannel(image, channel), table), image, channel)
        image = cv2.cvtColor(image, cv2.COLOR_HSV2RGB)
    if tables.after is not None:
        image = cv2.LUT(image, tables.after)
    return image


def _clip(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)
