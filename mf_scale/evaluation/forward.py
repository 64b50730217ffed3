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
from mf_scale.evaluation.inference import Segments, panoptic, semantic
from mf_scale.models.outputs import MaskPrediction

STRIDE = 4
"""Image pixels per cell of the pixel embeddings."""


@dataclass(frozen=True)
class Answer:
    """What a model says about one image."""

    prediction: MaskPrediction
    size: tuple[int, int]
    """H, W."""
    extent: tuple[float, float]
    """Cells of the prediction grid that hold the image."""

    def semantic(self) -> NDArray[np.int64]:
        """Class of every pixel [H,W]."""
        return semantic(self.prediction, self.size, extent=self.extent)[0].cpu().numpy()

    def panoptic(self, things: list[bool], config: Config) -> tuple[NDArray[np.int32], Segments]:
        """Segment map [H,W], -1 for void, and its segments."""
        limits = config.eval.object_threshold, config.eval.overlap_threshold
        segment_map, segments = panoptic(self.prediction, self.size, things, *limits, extent=self.extent)[0]
        return segment_map.cpu().numpy(), segments


@torch.inference_mode()
def answer(model: nn.Module, image: NDArray[Any], config: Config) -> Answer:
    """Predict one uint8 image [H,W,3] with a model in eval mode; bf16 where the configuration says, on CUDA only."""
    height, width = image.shape[:2]
    resized = inference_size(height, width, config.eval.short_side, config.eval.max_side)
    pixels = resize_part(image, Window(0, 0, height, width, *resized))
    device = next(model.parameters()).device
    batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].to(device)
    half = config.train.precision == "bf16" and device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        prediction = model(batch)
    return Answer(prediction, (height, width), (resized[0] / STRIDE, resized[1] / STRIDE))


def inference_size(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """Height and width for inference: the shorter side becomes `short_side`, the longer at most `max_side`."""
    scale = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
