"""Views: the scales, mirror images and windows that an image is predicted in. Pure, but for the model's forward.

Shapes: H W the image's own size, R S its size at one scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mf_scale.config.schema import Config, EvalConfig
from mf_scale.data.transforms import Window, resize_part
from mf_scale.evaluation.masks import Part
from mf_scale.models.outputs import MaskPrediction, PixelPrediction
from mf_scale.models.prepare import SMALLEST_SIDE


@dataclass(frozen=True)
class View:
    """What the model says about one view of an image."""

    prediction: MaskPrediction | PixelPrediction
    extent: tuple[float, float]
    """Cells of the prediction grid that hold the whole image at this scale."""
    part: Part | None
    """The part of the (mirrored) image that the grid covers; None: all of it."""
    flipped: bool
    """The view is of the mirrored image."""


def predicted_views(model: nn.Module, image: NDArray[Any], config: Config) -> tuple[tuple[View, ...], ...]:
    """The views of one uint8 image [H,W,3], by scale: the upright ones, then the mirrored ones."""
    mirrored = (False, True) if config.eval.flip else (False,)
    return tuple(
        tuple(view for flipped in mirrored for view in _at_scale(model, image, config, scale, flipped))
        for scale in config.eval.scales
    )


def inference_size(height: int, width: int, short_side: float, max_side: float) -> tuple[int, int]:
    """Height and width for inference: the shorter side becomes `short_side`, the longer at most `max_side`."""
    scale = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along a side: as few as cover it with `overlap` (0..1) or more, the last at the end."""
    if window >= size:
        return [0]
    stride = max(1, math.floor(window * (1 - overlap)))
    return [min(i * stride, size - window) for i in range(math.ceil((size - window) / stride) + 1)]


def _at_scale(model: nn.Module, image: NDArray[Any], config: Config, scale: float, flipped: bool) -> Iterator[View]:
    # Mirrored before it is resized: the views of a mirrored image are then the same two, bit for bit.
    shown = np.ascontiguousarray(image[:, ::-1]) if flipped else image
    size = shown.shape[0], shown.shape[1]
    resized = inference_size(*size, config.eval.short_side * scale, config.eval.max_side * scale)
    pixels = resize_part(shown, Window(0, 0, *size, *resized))
    stride = float(model.stride)  # type: ignore[arg-type]  # every kind of model has it
    extent = resized[0] / stride, resized[1] / stride
    for window, part in _windows(size, resized, config.eval, stride):
        yield View(_forward(model, pixels[window], config), extent, part, flipped)


def _windows(
    size: Sequence[int], resized: Sequence[int], settings: EvalConfig, stride: float
) -> Iterator[tuple[tuple[slice, slice], Part | None]]:
    """Windows as slices of the resized image, each with the part of the result whose pixel centres lie in it."""
    sides = settings.window or resized
    if sides[0] >= resized[0] and sides[1] >= resized[1]:
        yield (slice(None), slice(None)), None
        return
    for top in window_starts(resized[0], sides[0], settings.window_overlap):
        for left in window_starts(resized[1], sides[1], settings.window_overlap):
            window = slice(top, top + sides[0]), slice(left, left + sides[1])
            rows, columns = (covered(*of_side) for of_side in zip(window, size, resized, strict=True))
            if rows.start < rows.stop and columns.start < columns.stop:
                yield window, Part(rows, columns, (top / stride, left / stride))


def covered(window: slice, size: int, resized: int) -> slice:
    """Pixels of a side of `size` whose centres lie in a window of the resized side."""
    first, last = (math.ceil(min(edge, resized) * size / resized - 0.5) for edge in (window.start, window.stop))
    return slice(first, last)


def _forward(model: nn.Module, pixels: NDArray[Any], config: Config) -> MaskPrediction | PixelPrediction:
    device = next(model.parameters()).device
    batch = torch.from_numpy(np.ascontiguousarray(_wide_enough(pixels).transpose(2, 0, 1)))[None].to(device)
    half = config.train.precision == "bf16" and device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return model(batch)


def _wide_enough(pixels: NDArray[Any]) -> NDArray[Any]:
    """A strip thinner than the model takes, widened below and right by its own edge; `View.extent` leaves it out."""
    missing = [(0, max(0, SMALLEST_SIDE - side)) for side in pixels.shape[:2]]
    return np.pad(pixels, (*missing, (0, 0)), mode="edge")
