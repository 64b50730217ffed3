"""Rules across sections, checked before anything is started. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from mf_scale.config.data_rules import DATA_RULES
from mf_scale.config.deepspeed_keys import broken_additions, uneven_partition
from mf_scale.config.run_rules import RUN_RULES
from mf_scale.config.schema import Config, DataConfig, ModelConfig, PixelLevelConfig
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: global_batch = micro_batch x accumulation x world size."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


def plan_batch(config: Config, world_size: int) -> BatchPlan:
    """Cut the global batch over the ranks; raises UserError where it, or ZeRO's groups, cannot be cut so.

    A rank's share that train.micro_batch does not divide is cut by its largest divisor below.
    """
    total = config.train.global_batch
    if total % world_size:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        raise UserError(
            f"train.global_batch = {total} cannot be shared by {world_size} ranks",
            remedy=f"Start {_listed(divisors)} ranks, or take train.global_batch="
            f"{_nearest_multiple(total, world_size)}.",
        )
    if (uneven := uneven_partition(config.deepspeed, world_size)) is not None:
        raise UserError(uneven, where="configuration", remedy="Take a divisor, usually the GPUs of one machine.")
    share = total // world_size
    micro = max(size for size in range(1, min(share, config.train.micro_batch) + 1) if share % size == 0)
    return BatchPlan(total, micro, share // micro, world_size)


def plan_note(config: Config, plan: BatchPlan) -> str | None:
    """A sentence where a rank's forward takes fewer samples than train.micro_batch."""
    wanted, share = config.train.micro_batch, plan.micro_batch * plan.accumulation
    if plan.micro_batch == wanted:
        return None
    return f"train.micro_batch = {wanted} does not divide the {share} samples of a rank: {plan.micro_batch} are taken"


def check_vocabulary(config: Config, vocabulary: Vocabulary, *, where: str) -> int:
    """K, the number of classes; raises UserError where model.num_classes contradicts the vocabulary."""
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(vocabulary):
        raise UserError(
            f"model.num_classes = {wanted}, but vocabulary {vocabulary.name!r} has {len(vocabulary)} classes",
            where=where,
            remedy=f"Leave model.num_classes out (it then is {len(vocabulary)}), or train on another source. "
            "Weights of another vocabulary can start a run with --reinit-head.",
        )
    if not len(vocabulary):
        raise UserError(f"vocabulary {vocabulary.name!r} has no class", where=where)
    return len(vocabulary)


def validate(config: Config) -> None:
    """Every rule that needs neither data nor ranks; all broken ones are named at once in a UserError."""
    values = dict(_leaves(config, ""))
    broken = [f"{name} = {v} must be a finite number" for name, v in values.items() if _is_not_finite(v)]
    broken += [f"{name} = {values[name]} must be above 0" for name in _POSITIVE if not values[name] > 0]
    broken += [f"{name} = {values[name]} must not be negative" for name in _NOT_NEGATIVE if values[name] < 0]
    broken += [f"{name} = {values[name]} must lie in 0..1" for name in _SHARES if not 0 <= values[name] <= 1]
    rules = (_paths, _start, _sizes, _schedule, _model, _per_pixel, _pixel_level, _deepspeed)
    broken += [sentence for rule in (*rules, *DATA_RULES, *RUN_RULES) for sentence in rule(config)]
    if broken:
        raise UserError("; ".join(broken), where="configuration", remedy="Nothing was started.")


_POSITIVE = [
    "train.steps",
    "train.global_batch",
    "train.micro_batch",
    "train.log_every",
    "guard.skipped_in_a_row",
    "guard.window",
    "guard.spike_window",
    "guard.spike_skip",
    "guard.spike_rollbacks",
    "train.collective_timeout",
    "data.block_samples",
    "data.prefetch_steps",
    "data.buffer_mib",
    "data.max_pixels",
    "model.decoder.queries",
    "model.decoder.layers",
    "model.decoder.width",
    "model.decoder.heads",
    "model.decoder.feedforward",
    "model.pixel_decoder.width",
    "model.pixel_decoder.mask_channels",
    "model.size_divisor",
    "eval.instance_top_k",
    "schedule.gamma",
    "eval.loss_samples",
    "zero.bucket_mib",
    "launch.fruitless_starts",
    "optimizer.lr",
    "optimizer.eps",
    "schedule.power",
]
_NOT_NEGATIVE = [
    "seed",
    "data.workers",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep_every",
    "train.stop_before",
    "train.gc_every",
    "train.hang_timeout",
    "train.straggler_every",
    "guard.spike_factor",
    "eval.every_steps",
    "eval.metrics_every_steps",
    "eval.metrics_samples",
    "model.pixel_decoder.encoder_layers",
    "optimizer.weight_decay",
    "optimizer.backbone_multiplier",
    "optimizer.clip_norm",
    "schedule.warmup_updates",
    "loss.class_weight",
    "loss.focal_weight",
    "loss.dice_weight",
    "loss.focal_gamma",
    "loss.points",
    "matching.class_weight",
    "matching.focal_weight",
    "matching.dice_weight",
]
_SHARES = [
    "guard.skipped_share",
    "ema.decay",
    "data.flip",
    "data.max_bad_fraction",
    "model.decoder.dropout",
    "model.backbone.drop_path",
    "model.backbone.dropout",
    "model.backbone.attention_dropout",
    "eval.mask_threshold",
    "eval.instance_threshold",
    "loss.no_object_weight",
    "loss.focal_alpha",
    "schedule.warmup_start",
    "eval.object_threshold",
    "eval.overlap_threshold",
]
_SMALLEST_SIDE = 64
"""Below, the stride-32 map is a single pixel, over which a group norm has nothing to normalise."""


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def _is_not_finite(value: Any) -> bool:
    return any(isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, list) else [value]))


def _paths(config: Config) -> list[str]:
    broken = []
    given = {
        "run_dir": config.run_dir,
        "data.train": config.data.train,
        "train.init_from": config.train.init_from,
        "model.backbone.weights": config.model.backbone.weights,
    }
    for name, path in given.items():
        if path is not None and not path.strip():
            broken.append(f"{name} is empty")
        elif path is not None and path.startswith("~"):
            broken.append(f"{name} = {path}: ~ is not expanded here, write the whole path")
    return broken


def _start(config: Config) -> list[str]:
    if config.train.reinit_head and config.train.init_from is None:
        return [
            "train.reinit_head (--reinit-head) does nothing without train.init_from, whose class head it leaves out"
        ]
    return []


def _sizes(config: Config) -> list[str]:
    broken = []
    crop, scale = config.data.crop, config.data.scale
    if config.seed >= 2**63:
        broken.append(f"seed = {config.seed} must be below 2**63")
    if config.checkpoint.keep_last < 2:
        keep = config.checkpoint.keep_last
        broken.append(f"checkpoint.keep_last = {keep} must be at least 2: the newest may be found damaged")
    if len(crop) != 2 or min(crop, default=0) < _SMALLEST_SIDE:
        broken.append(f"data.crop = {crop} must be [height, width], each at least {_SMALLEST_SIDE}")
    if config.eval.short_side < _SMALLEST_SIDE:
        broken.append(f"eval.short_side = {config.eval.short_side} must be at least {_SMALLEST_SIDE}")
    if len(scale) != 2 or not 0 < scale[0] <= scale[-1]:
        broken.append(f"data.scale = {scale} must be [smallest, largest], above 0")
    if config.data.resize == "detr" and scale != DataConfig().scale:
        broken.append(f"data.scale = {scale} does nothing with data.resize = detr, whose sizes are DETR's")
    if config.eval.max_side < config.eval.short_side:
        broken.append(f"eval.max_side = {config.eval.max_side} is below eval.short_side = {config.eval.short_side}")
    stages = config.model.backbone.recompute_stages
    if not set(stages) <= {1, 2, 3, 4}:
        broken.append(f"model.backbone.recompute_stages = {stages} must hold numbers from 1 to 4")
    if min(config.model.backbone.multi_grid, default=1) < 1:
        broken.append(f"model.backbone.multi_grid = {config.model.backbone.multi_grid} must hold numbers from 1")
    if len(config.optimizer.betas) != 2 or not all(0 <= b < 1 for b in config.optimizer.betas):
        broken.append(f"optimizer.betas = {config.optimizer.betas} must be two numbers in 0..1")
    return broken


def _schedule(config: Config) -> list[str]:
    name, milestones = config.schedule.name, config.schedule.milestones
    if name == "step" and not milestones:
        return ["schedule.name = step needs schedule.milestones, for example [80000,120000]"]
    if name != "step" and milestones:
        return [f"schedule.milestones = {milestones} does nothing with schedule.name = {name}"]
    if milestones != sorted({m for m in milestones if m > 0}):
        return [f"schedule.milestones = {milestones} must be updates above 0, each later than the one before"]
    return []


def _model(config: Config) -> list[str]:
    decoder = config.model.decoder
    if min(decoder.width, decoder.heads) < 1:
        return []  # named already
    broken = []
    if decoder.width % decoder.heads:
        broken.append(
            f"model.decoder.width = {decoder.width} is not a multiple of model.decoder.heads = {decoder.heads}"
        )
    if decoder.width % 4:
        broken.append(f"model.decoder.width = {decoder.width} must be a multiple of 4 (sine positions)")
    return broken


def _per_pixel(config: Config) -> list[str]:
    kind, task = config.model.kind, config.data.task
    if kind == "mask_classification" or task == "semantic":
        return []
    return [f"model.kind = {kind} gives every pixel a class and knows no segments: it needs data.task = semantic"]


def _pixel_level(config: Config) -> list[str]:
    """What does nothing is refused: a backbone beside a model of one's own is a misunderstanding."""
    model, given = config.model, config.model.pixel_level
    if given.builder is None:
        inert = {f"model.pixel_level.{n}": v for n, v in _leaves(given, "") if v != getattr(PixelLevelConfig(), n)}
        return [f"{name} = {value} does nothing without model.pixel_level.builder" for name, value in inert.items()]
    fresh = ModelConfig()
    other = [("backbone", f.name) for f in fields(model.backbone) if f.name != "freeze_norm"]
    other += [("pixel_decoder", "width"), ("pixel_decoder", "encoder_layers")]
    broken = []
    for section, name in other:
        value = getattr(getattr(model, section), name)
        if value != getattr(getattr(fresh, section), name):
            broken.append(f"model.{section}.{name} = {value} does nothing with model.pixel_level.builder")
    if model.kind == "per_pixel" and given.memory is not None:
        broken.append(f"model.pixel_level.memory = {given.memory} does nothing with model.kind = per_pixel")
    if len(given.mean) != 3 or len(given.std) != 3 or min(given.std) <= 0:
        broken.append(f"model.pixel_level.mean = {given.mean}, std = {given.std}: three numbers each, std above 0")
    return broken


def _deepspeed(config: Config) -> list[str]:
    return broken_additions(config.deepspeed, config.zero.stage)


def _listed(values: list[int]) -> str:
    shown = values if len(values) <= 12 else [*values[:10], values[-1]]
    return " or ".join(map(str, shown))


def _nearest_multiple(total: int, world_size: int) -> int:
    return max(world_size, round(total / world_size) * world_size)
