"""The learning-rate factor: a pure function of the update count, so nothing of it needs saving."""

from __future__ import annotations

from mf_scale.config.schema import ScheduleConfig


def lr_factor(config: ScheduleConfig, update: int, steps: int) -> float:
    """Factor on the base learning rate for update number `update` (from 0) of a run of `steps` steps.

    Linear warm-up from `warmup_start` multiplies the schedule's own factor there, as detectron2's WarmupPolyLR and
    WarmupMultiStepLR do.
    """
    factor = 1.0
    if config.name == "poly":
        factor = max(0.0, 1.0 - update / steps) ** config.power
    elif config.name == "step":
        factor = config.gamma ** sum(update >= milestone for milestone in config.milestones)
    if update < config.warmup_updates:
        progress = update / config.warmup_updates
        factor *= config.warmup_start * (1.0 - progress) + progress
    return factor
