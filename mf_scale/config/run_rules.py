"""Rules of the run itself: precision, ZeRO, moving average, guards, stop signals. Pure; see `validate.py`."""

from __future__ import annotations

from mf_scale.config.schema import Config, GuardConfig
from mf_scale.config.signals import STOPPING


def _zero(config: Config) -> list[str]:
    zero, broken = config.zero, []
    if zero.offload_optimizer and zero.stage < 1:
        broken.append("zero.offload_optimizer does nothing with zero.stage = 0: take stage 1, 2 or 3")
    if zero.offload_parameters and zero.stage < 3:
        broken.append(f"zero.offload_parameters does nothing with zero.stage = {zero.stage}: take stage 3")
    return broken


def _average(config: Config) -> list[str]:
    broken = []
    if config.ema.decay == 1:
        broken.append("ema.decay = 1.0 would keep the first weights for ever: it must be below 1")
    if config.eval.weights == "ema" and not config.ema.decay:
        broken.append("eval.weights = ema asks for a moving average that ema.decay = 0 does not keep: take auto or raw")
    return broken


def _guard(config: Config) -> list[str]:
    guard, fresh, broken = config.guard, GuardConfig(), []
    inert = []
    if not guard.spike_factor:
        inert += [(name, "spike_factor = 0") for name in ("spike_window", "spike_skip", "spike_rollbacks")]
    if guard.skipped_share in (0, 1):  # no share of steps is above 1
        inert.append(("window", f"skipped_share = {guard.skipped_share:g}"))
    for name, off in inert:
        if (value := getattr(guard, name)) != getattr(fresh, name):
            broken.append(f"guard.{name} = {value} does nothing with guard.{off}")
    if 0 < guard.spike_factor <= 1:
        broken.append(
            f"guard.spike_factor = {guard.spike_factor} would take every ordinary loss for a spike: above 1, or 0 (off)"
        )
    return broken


def _stop_signals(config: Config) -> list[str]:
    return [
        f"train.stop_signals: {name!r} cannot ask a run to stop; what can: {', '.join(STOPPING)}"
        for name in config.train.stop_signals
        if name not in STOPPING
    ]


def _deterministic(config: Config) -> list[str]:
    if config.train.deterministic and config.model.attention == "xformers":
        return [
            "model.attention = xformers adds in no fixed order in its backward pass: with train.deterministic take "
            "auto or sdpa"
        ]
    return []


RUN_RULES = (_zero, _average, _guard, _stop_signals, _deterministic)
