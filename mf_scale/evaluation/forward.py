"""One image through the model: resized for inference, predicted, with the geometry to bring the answer back.

Shapes: H W the image's own size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mf_scale.config.schema import Config
from mf_scale.data.transforms import Window, resize_part
from mf_scale.errors import UserError
from mf_scale.evaluation.inference import Instances, Segments, instance, panoptic, semantic
from mf_scale.evaluation.per_pixel import per_pixel_semantic
from mf_scale.models.outputs import MaskPrediction, PixelPrediction
from mf_scale.models.prepare import SMALLEST_SIDE


@dataclass(frozen=True)
class Answer:
    """What a model says about one image."""

    prediction: MaskPrediction | PixelPrediction
    size: tuple[int, int]
    """H, W."""
    extent: tuple[float, float]
    """Cells of the prediction grid that hold the image."""

    def semantic(self) -> NDArray[np.int64]:
        """Class of every pixel [H,W]."""
        if isinstance(self.prediction, PixelPrediction):
            return per_pixel_semantic(self.prediction, self.size, extent=self.extent)[0].cpu().numpy()
        return semantic(self.prediction, self.size, extent=self.extent)[0].cpu().numpy()

    def panoptic(self, things: list[bool], config: Config) -> tuple[NDArray[np.int32], Segments]:
        """Segment map [H,W], -1 for void, and its segments."""
        limits = config.eval.object_threshold, config.eval.overlap_threshold
        segment_map, segments = panoptic(
            self._masks(),
            self.size,
            things,
            *limits,
            mask_threshold=config.eval.mask_threshold,
            extent=self.extent,
        )[0]
        return segment_map.cpu().numpy(), segments

    def instance(self, things: list[bool], config: Config) -> Instances:
        """Instances of the thing classes, best first."""
        limits = config.eval.instance_top_k, config.eval.instance_threshold
        return instance(
            self._masks(),
            self.size,
            things,
            *limits,
            mask_threshold=config.eval.mask_threshold,
            extent=self.extent,
        )[0]

    def _masks(self) -> MaskPrediction:
        if isinstance(self.prediction, PixelPrediction):
            raise UserError(
                "a per-pixel model gives every pixel a class and knows no segments",
                where="model.kind",
                remedy="Use --task semantic.",
            )
        return self.prediction


@torch.inference_mode()
def answer(model: nn.Module, image: NDArray[Any], config: Config) -> Answer:
    """Predict one uint8 image [H,W,3] with a model in eval mode; bf16 where the configuration says, on CUDA only."""
    height, width = image.shape[:2]
    resized = inference_size(height, width, config.eval.short_side, config.eval.max_side)
    pixels = _wide_enough(resize_part(image, Window(0, 0, height, width, *resized)))
    device = next(model.parameters()).device
    batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].to(device)
    half = config.train.precision == "bf16" and device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        prediction = model(batch)
    stride = float(model.stride)  # type: ignore[arg-type]  # every kind of model has it
    return Answer(prediction, (height, width), (resized[0] / stride, resized[1] / stride))


def _wide_enough(pixels: NDArray[Any]) -> NDArray[Any]:
    """A strip thinner than the model takes, widened below and right by its own edge; `Answer.extent` leaves it out."""
    missing = [(0, max(0, SMALLEST_SIDE - side)) for side in pixels.shape[:2]]
    return np.pad(pixels, (*missing, (0, 0)), mode="edge")


def inference_size(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """Height and width for inference: the shorter side becomes `short_side`, the longer at most `max_side`."""
    scale = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
