"""One image through the model: its views predicted, and the answer to each task at the image's own size.

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
from mf_scale.errors import UserError
from mf_scale.evaluation.averaging import averaged_semantic
from mf_scale.evaluation.inference import Instances, Segments, instance, panoptic, semantic
from mf_scale.evaluation.per_pixel import per_pixel_semantic
from mf_scale.evaluation.views import View, inference_size, predicted_views
from mf_scale.models.outputs import MaskPrediction, PixelPrediction

__all__ = ["Answer", "answer", "inference_size"]


@dataclass(frozen=True)
class Answer:
    """What a model says about one image."""

    scales: tuple[tuple[View, ...], ...]
    """The views by scale: one in all unless eval.scales, eval.flip or eval.window ask for more."""
    size: tuple[int, int]
    """H, W."""
    budget: int
    """fp32 values alive at once while masks and scores are made at full size."""

    @property
    def prediction(self) -> MaskPrediction | PixelPrediction:
        """Of the first view."""
        return self.scales[0][0].prediction

    @property
    def extent(self) -> tuple[float, float]:
        """Cells of the first view's grid that hold the image."""
        return self.scales[0][0].extent

    def semantic(self) -> NDArray[np.int64]:
        """Class of every pixel [H,W]; of several views the class with the largest mean score."""
        if self._several():
            return averaged_semantic(self.scales, self.size, budget=self.budget).cpu().numpy()
        if isinstance(self.prediction, PixelPrediction):
            return (
                per_pixel_semantic(self.prediction, self.size, extent=self.extent, budget=self.budget)[0].cpu().numpy()
            )
        return semantic(self.prediction, self.size, extent=self.extent, budget=self.budget)[0].cpu().numpy()

    def panoptic(self, things: list[bool], config: Config) -> tuple[NDArray[np.int32], Segments]:
        """Segment map [H,W], -1 for void, and its segments; UserError for several views."""
        limits = config.eval.object_threshold, config.eval.overlap_threshold
        segment_map, segments = panoptic(
            self._masks(),
            self.size,
            things,
            *limits,
            mask_threshold=config.eval.mask_threshold,
            extent=self.extent,
            budget=self.budget,
        )[0]
        return segment_map.cpu().numpy(), segments

    def instance(self, things: list[bool], config: Config) -> Instances:
        """Instances of the thing classes, best first; UserError for several views."""
        limits = config.eval.instance_top_k, config.eval.instance_threshold
        return instance(
            self._masks(),
            self.size,
            things,
            *limits,
            mask_threshold=config.eval.mask_threshold,
            extent=self.extent,
            budget=self.budget,
        )[0]

    def _several(self) -> bool:
        return len(self.scales) > 1 or len(self.scales[0]) > 1 or self.scales[0][0].part is not None

    def _masks(self) -> MaskPrediction:
        if isinstance(self.prediction, PixelPrediction):
            raise UserError(
                "a per-pixel model gives every pixel a class and knows no segments",
                where="model.kind",
                remedy="Use --task semantic.",
            )
        if self._several():
            # Query 7 of one view and query 7 of another are different segments: there is nothing to average.
            raise UserError(
                "segments of several views (eval.scales, eval.flip, eval.window) cannot be averaged",
                where="eval",
                remedy="Use one scale, no flip and no window, or --task semantic.",
            )
        return self.prediction


@torch.inference_mode()
def answer(model: nn.Module, image: NDArray[Any], config: Config) -> Answer:
    """Predict one uint8 image [H,W,3] with a model in eval mode; bf16 where the configuration says, on CUDA only.

    semantic: scores of classes averaged over eval.scales, mirror images (eval.flip) and windows (eval.window).
    panoptic, instance: one view, whole; a single other scale is a view too.
    """
    budget = config.eval.memory_budget * 2**20 // 4
    return Answer(predicted_views(model, image, config), (image.shape[0], image.shape[1]), budget)
