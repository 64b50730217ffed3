"""Which loss a kind of model is trained with."""

from __future__ import annotations

from mf_scale.config.schema import Config
from mf_scale.losses.criterion import Criterion
from mf_scale.losses.pixel_criterion import PixelCriterion
from mf_scale.losses.terms import StepLoss


def choose_criterion(config: Config, num_classes: int) -> StepLoss:
    """The loss of `config.model.kind` for K classes."""
    if config.model.kind == "mask_classification":
        return Criterion(config.loss, config.matching, num_classes, config.model.decoder.queries)
    return PixelCriterion()
