"""Rules of the run itself: precision, ZeRO, moving average, guards, stop signals. Pure; see `validate.py`."""

from __future__ import annotations

from mf_scale.config.class_rules import CLASS_RULES
from mf_scale.config.schema import Config, EvalConfig, GuardConfig, TrainConfig
from mf_scale.config.signals import STOPPING

_SMALLEST_WINDOW = 64
"""Below, the stride-32 map is a single pixel."""

_MOST_PROFILED = 100
"""Steps: each leaves some 10 MiB of trace."""


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


def _views(config: Config) -> list[str]:
    """Several views of an image have no queries in common: only scores of classes can be averaged."""
    given, fresh, broken = config.eval, EvalConfig(), []
    if not given.scales or min(given.scales) <= 0:
        broken.append(f"eval.scales = {given.scales} must hold numbers above 0")
    elif len(set(given.scales)) < len(given.scales):
        broken.append(f"eval.scales = {given.scales} holds a scale twice")
    if given.window and (len(given.window) != 2 or min(given.window) < _SMALLEST_WINDOW):
        broken.append(
            f"eval.window = {given.window} must be [height, width], each at least {_SMALLEST_WINDOW}, or [] for none"
        )
    if given.memory_budget < 1:
        broken.append(f"eval.memory_budget = {given.memory_budget} must be at least 1 MiB")
    if not 0 <= given.window_overlap < 1:
        broken.append(f"eval.window_overlap = {given.window_overlap} must lie in 0..1, below 1")
    if not given.window and given.window_overlap != fresh.window_overlap:
        broken.append(f"eval.window_overlap = {given.window_overlap} does nothing without eval.window")
    if config.data.task != "semantic":
        several = {"scales": len(given.scales) > 1, "flip": given.flip, "window": bool(given.window)}
        broken += [
            f"eval.{name} = {getattr(given, name)} averages class scores over several views of an image, and segments "
            f"of different views are not the same segments: it needs data.task = semantic, not {config.data.task}"
            for name, on in several.items()
            if on
        ]
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


def _watching(config: Config) -> list[str]:
    """Stragglers and profiles."""
    train, fresh, broken = config.train, TrainConfig(), []
    if train.straggler_factor <= 1:
        broken.append(
            f"train.straggler_factor = {train.straggler_factor} would name a rank that is like the others: "
            "above 1, or train.straggler_every=0 (off)"
        )
    if not train.straggler_every and train.straggler_factor != fresh.straggler_factor:
        broken.append(f"train.straggler_factor = {train.straggler_factor} does nothing with train.straggler_every = 0")
    first, last = (train.profile[0], train.profile[-1]) if train.profile else (1, 1)
    if (train.profile and len(train.profile) != 2) or not 1 <= first <= last:
        broken.append(f"train.profile = {train.profile} must be [first, last], steps from 1, or [] for none")
    elif last > train.steps:
        broken.append(f"train.profile = {train.profile} lies behind the last step, train.steps = {train.steps}")
    elif last - first >= _MOST_PROFILED:
        broken.append(
            f"train.profile = {train.profile} are {last - first + 1} steps, whose trace would fill the memory: "
            f"take {_MOST_PROFILED} at most"
        )
    if not train.profile and train.profile_ranks != fresh.profile_ranks:
        broken.append(f"train.profile_ranks = {train.profile_ranks} does nothing without train.profile")
    if not train.profile_ranks or min(train.profile_ranks) < 0:
        broken.append(f"train.profile_ranks = {train.profile_ranks} must hold ranks, from 0")
    return broken


def _evaluation(config: Config) -> list[str]:
    if config.eval.metrics_samples and not config.eval.metrics_every_steps:
        return [f"eval.metrics_samples = {config.eval.metrics_samples} does nothing with eval.metrics_every_steps = 0"]
    return []


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


RUN_RULES = (_zero, _average, _views, _guard, _watching, _evaluation, _stop_signals, _deterministic, *CLASS_RULES)
