"""Transforms: training geometry and colour on image and map together.

Crop-first: the window is drawn first and only the part of the source it shows is resized.
One numpy generator a sample, seeded by (seed, stream position), makes every draw, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch.nn import functional

from mf_scale.config.schema import DataConfig
from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.color import ColorTables, apply_color, draw_color
from mf_scale.data.decode import StoredSample, stack_layers
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
BAND = 64
"""Rows of an image that go through colour, flip and the change of layout together: 16 to 128 do as well."""


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
    sample: StoredSample,
    config: DataConfig,
    rules: TargetRules,
    generator: np.random.Generator,
    canvas: np.ndarray | None = None,
) -> ModelSample:
    """Random scale and crop, or DETR's choices of both; colour, flip; padded to data.crop.

    The image is written into `canvas`, uint8 [3,*crop], where one is given: its place in a batch.
    """
    height, width = sample.image.shape[:2]
    if config.resize == "detr":
        window = draw_detr_window(height, width, config.crop, generator)
    else:
        window = draw_window(height, width, config.crop, config.scale, generator)
    flip = bool(generator.random() < config.flip)
    color = draw_color(generator) if config.color else None
    image, stored_map = resize_part(sample.image, window), resize_map(sample.stored_map, window)
    return _place(image, stored_map, sample, config.crop, rules, flip=flip, color=color, canvas=canvas)


def fitted_sample(sample: StoredSample, crop: Sequence[int], rules: TargetRules) -> ModelSample:
    """The whole image fitted into `crop`, aspect kept, padded: nothing random."""
    height, width = sample.image.shape[:2]
    size = _scaled(height, width, min(crop[0] / height, crop[1] / width))
    window = Window(0, 0, height, width, *size)
    return _place(resize_part(sample.image, window), resize_map(sample.stored_map, window), sample, crop, rules)


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
    """The window of a uint8 [H,W,3] image at its size, bilinear; shrinking as Pillow does, over all pixels in reach."""
    part = image[window.top : window.bottom, window.left : window.right]
    if window.height < part.shape[0] or window.width < part.shape[1]:
        return _shrink(part, window.height, window.width)
    return cv2.resize(part, (window.width, window.height), interpolation=cv2.INTER_LINEAR)


def _shrink(part: np.ndarray, height: int, width: int) -> np.ndarray:
    """Within 1 of Pillow's bilinear filter, which the paper's code shrinks by, at a third of its time or OpenCV's."""
    part = part if part.flags.writeable else part.copy()  # torch warns of others
    pixels = torch.from_numpy(part)[None].permute(0, 3, 1, 2)  # in this order of strides torch keeps channels innermost
    made = functional.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)
    return made[0].permute(1, 2, 0).numpy()


def resize_map(stored_map: np.ndarray, window: Window) -> np.ndarray:
    """The window of a stored map [L,H,W] at its size, by the nearest pixel centre."""
    parts = stored_map[:, window.top : window.bottom, window.left : window.right]
    size = (window.width, window.height)
    return stack_layers([cv2.resize(part, size, interpolation=cv2.INTER_NEAREST_EXACT) for part in parts])


def _place(
    image: np.ndarray,
    stored_map: np.ndarray,
    sample: StoredSample,
    crop: Sequence[int],
    rules: TargetRules,
    *,
    flip: bool = False,
    color: ColorTables | None = None,
    canvas: np.ndarray | None = None,
) -> ModelSample:
    """Colour, flip, make targets, pad at the right and bottom: there the map is IGNORE, which layer 0 alone says."""
    if flip:
        stored_map = stack_layers([cv2.flip(layer, 1) for layer in stored_map])
    targets = make_targets(stored_map, sample, rules)
    targets = replace(targets, segment_map=_pad_map(targets.segment_map, crop))
    canvas = np.empty((3, *crop), np.uint8) if canvas is None else canvas
    _finish_image(image, flip, color, canvas)
    return ModelSample(canvas, targets)


def _finish_image(image: np.ndarray, flip: bool, color: ColorTables | None, canvas: np.ndarray) -> None:
    """uint8 [h,w,3] into [3,*crop], in bands of rows: what is done to a band finds it in the processor's cache."""
    height, width = image.shape[:2]
    canvas[:, height:] = PAD
    canvas[:, :height, width:] = PAD
    for top in range(0, height, BAND):
        band = image[top : top + BAND]
        if color is not None:
            band = apply_color(band, color)
        if flip:
            band = cv2.flip(band, 1)
        cv2.split(band, [channel[top : top + len(band), :width] for channel in canvas])


def _pad_map(segment_map: np.ndarray, crop: Sequence[int]) -> np.ndarray:
    layers, height, width = segment_map.shape
    if (height, width) == tuple(crop):
        return segment_map
    canvas = np.full((layers, *crop), NONE, np.int16)
    canvas[0] = IGNORE
    canvas[:, :height, :width] = segment_map
    return canvas
