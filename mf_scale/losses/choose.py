"""Which loss a kind of model is trained with."""

from __future__ import annotations

from collections.abc import Sequence

from mf_scale.config.schema import Config
from mf_scale.losses.criterion import Criterion
from mf_scale.losses.long_tail import make_adjustment
from mf_scale.losses.pixel_criterion import PixelCriterion
from mf_scale.losses.terms import StepLoss


def choose_criterion(config: Config, num_classes: int, images: Sequence[int] | None = None) -> StepLoss:
    """The loss of `config.model.kind` for K classes; `images` [K] of training that hold each, for loss.class_balance.

    None: as many of each class, where the numbers do not matter.
    """
    if config.model.kind == "mask_classification":
        adjustment = make_adjustment(config.loss, images if images is not None else [1] * num_classes)
        return Criterion(config.loss, config.matching, num_classes, config.model.decoder.queries, adjustment)
    return PixelCriterion()
