"""Transforms: training geometry and colour on image and map together.

Crop-first: the window is drawn first and only the part of the source it shows is resized.
One numpy generator a sample, seeded by (seed, stream position), makes every draw, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from mf_scale.config.schema import DataConfig
from mf_scale.data.decode import StoredSample, none_value
from mf_scale.data.targets import TargetRules, Targets, make_targets

PAD = 128
"""Image value outside the image; the map is IGNORE there."""
LONGEST = 4
"""Longer side after resizing at most, as a multiple of the crop's longer side (paper: 2048 for a crop of 512); twice
the largest shorter side if that is more (paper: 8192 on Mapillary, for a crop of 1280)."""
DETR_SHORTER, DETR_LONGER = range(480, 801, 32), 1333
"""DETR's choices of the shorter side, and the longer side at most, pixels."""
DETR_FIRST, DETR_CROP = (400, 500, 600), (384, 600)
"""DETR's choices of the shorter side before its crop, and the smallest and largest side of the crop, pixels."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18
"""SSD's ranges as the paper uses them; hue in steps of OpenCV's circle of 180."""


@dataclass(frozen=True)
class Window:
    """A part of the source image and the size it is resized to, pixels."""

    top: int
    left: int
    bottom: int
    right: int
    height: int
    width: int


@dataclass(frozen=True)
class ModelSample:
    """A sample in the fixed geometry of a batch."""

    image: np.ndarray
    """uint8 [3,h,w]."""
    targets: Targets


def sample_generator(seed: int, position: int) -> np.random.Generator:
    """Generator of the sample at a stream position: never of a worker, rank or clock."""
    return np.random.Generator(np.random.PCG64([seed % (1 << 63), position]))


def training_sample(
    sample: StoredSample, config: DataConfig, rules: TargetRules, generator: np.random.Generator
) -> ModelSample:
    """Random scale and crop, or DETR's choices of both; colour, flip; padded to data.crop."""
    height, width = sample.image.shape[:2]
    if config.resize == "detr":
        window = draw_detr_window(height, width, config.crop, generator)
    else:
        window = draw_window(height, width, config.crop, config.scale, generator)
    flip = generator.random() < config.flip
    image = resize_part(sample.image, window)
    if config.color:
        image = jitter_color(image, generator)
    return _place(image, resize_map(sample.stored_map, window), sample, config.crop, rules, flip)


def fitted_sample(sample: StoredSample, crop: Sequence[int], rules: TargetRules) -> ModelSample:
    """The whole image fitted into `crop`, aspect kept, padded: nothing random."""
    height, width = sample.image.shape[:2]
    size = _scaled(height, width, min(crop[0] / height, crop[1] / width))
    window = Window(0, 0, height, width, *size)
    return _place(
        resize_part(sample.image, window), resize_map(sample.stored_map, window), sample, crop, rules, flip=False
    )


def draw_window(
    height: int, width: int, crop: Sequence[int], scale: Sequence[float], generator: np.random.Generator
) -> Window:
    """Scale (shorter side to uniform(scale) x the crop's shorter side), then a crop of the scaled image."""
    factor = generator.uniform(scale[0], scale[1]) * min(crop) / min(height, width)
    longest = max(LONGEST * max(crop), 2 * scale[1] * min(crop))
    factor = min(factor, longest / max(height, width))
    scaled = _scaled(height, width, factor)
    taken = min(crop[0], scaled[0]), min(crop[1], scaled[1])
    top, bottom = _draw_span(height, scaled[0], taken[0], generator)
    left, right = _draw_span(width, scaled[1], taken[1], generator)
    return Window(top, left, bottom, right, *taken)


def draw_detr_window(height: int, width: int, crop: Sequence[int], generator: np.random.Generator) -> Window:
    """DETR's window on COCO: the whole image, or with p 0.5 a crop of a resized one; then a shorter side of 480 to 800.

    What would be larger than `crop` is scaled down to fit it. Source: DETR (Carion et al. 2020, section 4) and the
    mapper that MaskFormer trains on COCO panoptic with.
    """
    shorter = int(generator.choice(DETR_SHORTER))
    rows, columns, part = (0, height), (0, width), (height, width)
    if generator.random() < 0.5:
        scaled = _scaled(height, width, int(generator.choice(DETR_FIRST)) / min(height, width))
        part = _draw_detr_side(scaled[0], generator), _draw_detr_side(scaled[1], generator)
        rows = _draw_span(height, scaled[0], part[0], generator)
        columns = _draw_span(width, scaled[1], part[1], generator)
    size = _scaled(*part, min(shorter / min(part), DETR_LONGER / max(part)))
    size = _scaled(*size, min(1.0, crop[0] / size[0], crop[1] / size[1]))
    return Window(rows[0], columns[0], rows[1], columns[1], *size)


def _draw_detr_side(scaled: int, generator: np.random.Generator) -> int:
    smallest, largest = DETR_CROP
    return int(generator.integers(min(scaled, smallest), min(scaled, largest) + 1))


def _draw_span(side: int, scaled: int, taken: int, generator: np.random.Generator) -> tuple[int, int]:
    """Begin and end in a source of `side` pixels of `taken` pixels of it when scaled to `scaled`."""
    start = int(generator.integers(0, scaled - taken + 1))
    return start * side // scaled, -(-(start + taken) * side // scaled)


def _scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_part(image: np.ndarray, window: Window) -> np.ndarray:
    """The window of a uint8 [H,W,3] image at its size; shrinking averages over area, growing is bilinear."""
    part = image[window.top : window.bottom, window.left : window.right]
    shrinks = window.height < part.shape[0] or window.width < part.shape[1]
    return cv2.resize(
        part, (window.width, window.height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


def resize_map(stored_map: np.ndarray, window: Window) -> np.ndarray:
    """The window of a stored map [L,H,W] at its size, by the nearest pixel centre."""
    parts = stored_map[:, window.top : window.bottom, window.left : window.right]
    size = (window.width, window.height)
    return np.stack([cv2.resize(part, size, interpolation=cv2.INTER_NEAREST_EXACT) for part in parts])


def jitter_color(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """SSD's colour jitter on uint8 RGB by lookup tables, with at most one round trip through HSV."""
    applied = generator.random(4) < 0.5
    contrast_first = generator.random() < 0.5
    brightness = generator.uniform(-BRIGHTNESS, BRIGHTNESS) if applied[0] else 0.0
    contrast = generator.uniform(*CONTRAST) if applied[1] else 1.0
    saturation = generator.uniform(*SATURATION) if applied[2] else 1.0
    hue = int(generator.integers(-HUE, HUE + 1)) if applied[3] else 0
    level = np.arange(256, dtype=np.float32)
    if applied[0] or (applied[1] and contrast_first):
        brightened = np.clip(level + brightness, 0, 255)
        image = cv2.LUT(image, _clip(brightened * contrast if contrast_first else brightened))
    if applied[2] or applied[3]:
        tables = np.stack([(np.arange(256) + hue) % 180, _clip(level * saturation), level], axis=-1).astype(np.uint8)
        image = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        image = cv2.cvtColor(cv2.LUT(image, tables[None]), cv2.COLOR_HSV2RGB)
    if applied[1] and not contrast_first:
        image = cv2.LUT(image, _clip(level * contrast))
    return image


def _clip(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _place(
    image: np.ndarray, stored_map: np.ndarray, sample: StoredSample, crop: Sequence[int], rules: TargetRules, flip: bool
) -> ModelSample:
    """Flip, pad at the right and bottom, make targets."""
    if flip:
        image, stored_map = image[:, ::-1], stored_map[:, :, ::-1]
    height, width = image.shape[:2]
    canvas = np.full((3, *crop), PAD, np.uint8)
    canvas[:, :height, :width] = image.transpose(2, 0, 1)
    padded = np.full((len(stored_map), *crop), none_value(stored_map.dtype), stored_map.dtype)
    padded[0] += 1  # IGNORE, which layer 0 alone says
    padded[:, :height, :width] = stored_map
    return ModelSample(canvas, make_targets(padded, sample, rules))
