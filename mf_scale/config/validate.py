"""Rules across sections, checked before anything is started. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mf_scale.config.schema import Config
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
    """Cut the global batch over the ranks; raises UserError naming sizes that work."""
    total, micro = config.train.global_batch, config.train.micro_batch
    if total < 1 or micro < 1:
        raise UserError(f"train.global_batch = {total} and train.micro_batch = {micro} must be at least 1")
    if total % world_size:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        raise UserError(
            f"train.global_batch = {total} cannot be shared by {world_size} ranks",
            remedy=f"Start {_listed(divisors)} ranks, or take train.global_batch="
            f"{_nearest_multiple(total, world_size)}.",
        )
    share = total // world_size
    if share % micro:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        raise UserError(
            f"train.global_batch = {total} on {world_size} ranks is {share} samples a rank, "
            f"which train.micro_batch = {micro} does not divide",
            remedy=f"Take train.micro_batch = {_listed(divisors)}.",
        )
    return BatchPlan(total, micro, share // micro, world_size)


def check_vocabulary(config: Config, vocabulary: Vocabulary, *, where: str) -> int:
    """K, the number of classes; raises UserError where model.num_classes contradicts the vocabulary."""
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(vocabulary):
        raise UserError(
            f"model.num_classes = {wanted}, but vocabulary {vocabulary.name!r} has {len(vocabulary)} classes",
            where=where,
            remedy=f"Leave model.num_classes out (it then is {len(vocabulary)}), or train on another source.",
        )
    if not len(vocabulary):
        raise UserError(f"vocabulary {vocabulary.name!r} has no class", where=where)
    return len(vocabulary)


def validate(config: Config) -> None:
    """Every rule that needs neither data nor ranks; all broken ones are named at once in a UserError."""
    broken = [*_ranges(config), *_geometry(config), *_model(config)]
    if broken:
        raise UserError("; ".join(broken), where="configuration", remedy="Nothing was started.")


def _ranges(config: Config) -> list[str]:
    positive = {
        "train.steps": config.train.steps,
        "train.log_every": config.train.log_every,
        "train.max_skipped_steps": config.train.max_skipped_steps,
        "train.collective_timeout": config.train.collective_timeout,
        "data.block_samples": config.data.block_samples,
        "data.prefetch_steps": config.data.prefetch_steps,
        "data.buffer_mib": config.data.buffer_mib,
        "data.max_pixels": config.data.max_pixels,
        "model.decoder.queries": config.model.decoder.queries,
        "model.decoder.layers": config.model.decoder.layers,
        "model.pixel_decoder.mask_channels": config.model.pixel_decoder.mask_channels,
        "eval.short_side": config.eval.short_side,
        "zero.bucket_mib": config.zero.bucket_mib,
        "optimizer.lr": config.optimizer.lr,
    }
    not_negative = {
        "data.workers": config.data.workers,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
        "eval.every_steps": config.eval.every_steps,
        "eval.loss_samples": config.eval.loss_samples,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.clip_norm": config.optimizer.clip_norm,
        "schedule.warmup_updates": config.schedule.warmup_updates,
    }
    shares = {
        "data.flip": config.data.flip,
        "data.max_bad_fraction": config.data.max_bad_fraction,
        "model.decoder.dropout": config.model.decoder.dropout,
        "loss.no_object_weight": config.loss.no_object_weight,
        "eval.object_threshold": config.eval.object_threshold,
        "eval.overlap_threshold": config.eval.overlap_threshold,
    }
    broken = [f"{name} = {value} must be above 0" for name, value in positive.items() if value <= 0]
    broken += [f"{name} = {value} must not be negative" for name, value in not_negative.items() if value < 0]
    broken += [f"{name} = {value} must lie in 0..1" for name, value in shares.items() if not 0 <= value <= 1]
    if config.checkpoint.keep_last < 2:
        broken.append(
            f"checkpoint.keep_last = {config.checkpoint.keep_last} must be at least 2: the newest may be found damaged"
        )
    return broken


def _geometry(config: Config) -> list[str]:
    broken = []
    crop, scale = config.data.crop, config.data.scale
    if len(crop) != 2 or min(crop, default=0) < 32:
        broken.append(f"data.crop = {crop} must be [height, width], each at least 32")
    if len(scale) != 2 or not 0 < min(scale, default=0) <= max(scale, default=0) or scale[0] > scale[-1]:
        broken.append(f"data.scale = {scale} must be [smallest, largest], above 0")
    if config.eval.max_side < config.eval.short_side:
        broken.append(f"eval.max_side = {config.eval.max_side} is below eval.short_side = {config.eval.short_side}")
    if len(config.optimizer.betas) != 2 or not all(0 <= b < 1 for b in config.optimizer.betas):
        broken.append(f"optimizer.betas = {config.optimizer.betas} must be two numbers in 0..1")
    return broken


def _model(config: Config) -> list[str]:
    decoder = config.model.decoder
    if decoder.width % decoder.heads:
        return [f"model.decoder.width = {decoder.width} is not a multiple of model.decoder.heads = {decoder.heads}"]
    if decoder.width % 2:
        return [f"model.decoder.width = {decoder.width} must be even (sine positions)"]
    return []


def _listed(values: list[int]) -> str:
    shown = values if len(values) <= 12 else [*values[:10], values[-1]]
    return " or ".join(map(str, shown))


def _nearest_multiple(total: int, world_size: int) -> int:
    return max(world_size, round(total / world_size) * world_size)
