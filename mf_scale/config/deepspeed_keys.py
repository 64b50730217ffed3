"""What the raw `deepspeed:` section may add to DeepSpeed's configuration, and what other sections set."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "model.backbone.recompute_stages",
    "compile": "model.compile",
    "wandb": "tracking",
    "tensorboard": "tracking",
    "csv_monitor": "tracking",
    "checkpoint": "checkpoint",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.reduce_bucket_size": "zero.bucket_mib",
    "zero_optimization.allgather_bucket_size": "zero.bucket_mib",
    "zero_optimization.offload_optimizer": "zero.offload_optimizer",
    "zero_optimization.offload_param": "zero.offload_parameters",
    "zero_optimization.cpu_offload": "zero.offload_optimizer",
}
"""DeepSpeed's keys that sections of ours set, which two places may not do."""


@dataclass(frozen=True)
class Addition:
    """What a key of the raw section takes, and the ZeRO stages at which DeepSpeed reads it."""

    kind: type[bool | int | float | str]
    stages: tuple[int, ...] = (0, 1, 2, 3)
    least: float = -math.inf
    choices: tuple[str, ...] = ()

    def takes(self, value: Any) -> bool:
        """Whether it is of the kind, finite, and not below the least."""
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind or (self.choices and value not in self.choices):
            return False
        return not isinstance(value, int | float) or (math.isfinite(value) and value >= self.least)

    @property
    def said(self) -> str:
        """What it takes, in words."""
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.kind]
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return words if math.isinf(self.least) else f"{words} from {self.least}"


_PARTITIONED, _STAGE_3 = (1, 2, 3), (3,)

ADDITIONS = {
    "communication_data_type": Addition(str, choices=("fp32", "bf16", "fp16")),
    "flops_profiler.enabled": Addition(bool),
    "flops_profiler.detailed": Addition(bool),
    "flops_profiler.module_depth": Addition(int, least=-1),
    "flops_profiler.output_file": Addition(str),
    "flops_profiler.profile_step": Addition(int, least=1),
    "flops_profiler.recompute_fwd_factor": Addition(float, least=0),
    "flops_profiler.top_modules": Addition(int, least=1),
    "memory_breakdown": Addition(bool),
    "wall_clock_breakdown": Addition(bool),
    "zero_optimization.contiguous_gradients": Addition(bool, _PARTITIONED),
    "zero_optimization.log_trace_cache_warnings": Addition(bool, _STAGE_3),
    "zero_optimization.overlap_comm": Addition(bool, _PARTITIONED),
    "zero_optimization.reduce_scatter": Addition(bool, _PARTITIONED),
    "zero_optimization.stage3_allgather_sequential": Addition(bool, _STAGE_3),
    "zero_optimization.stage3_max_live_parameters": Addition(int, _STAGE_3, least=0),
    "zero_optimization.stage3_max_reuse_distance": Addition(int, _STAGE_3, least=0),
    "zero_optimization.stage3_module_granularity_threshold": Addition(int, _STAGE_3, least=0),
    "zero_optimization.stage3_param_persistence_threshold": Addition(int, _STAGE_3, least=0),
    "zero_optimization.stage3_prefetch_bucket_size": Addition(int, _STAGE_3, least=0),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": Addition(bool, _STAGE_3),
    "zero_optimization.sub_group_size": Addition(int, _STAGE_3, least=1),
    "zero_optimization.use_multi_rank_bucket_allreduce": Addition(bool, (1, 2)),
    "zero_optimization.zero_hpz_partition_size": Addition(int, _STAGE_3, least=1),
}
"""Keys that the raw section may add; tests hold names, kinds and stages to the installed DeepSpeed."""

REFUSED = {
    "prescale_gradients": "DeepSpeed refuses it at some stages, and the loss scale does here what it is for",
    "gradient_predivide_factor": "DeepSpeed refuses it at some stages, and the loss scale does here what it is for",
    "comms_logger": "its numbers go to DeepSpeed's log, which is off here, or wait for a call that nobody makes",
    "dump_state": "it writes to DeepSpeed's log, which is off here",
    "zero_optimization.allgather_partitions": "DeepSpeed does not read it any more",
    "zero_optimization.ignore_unused_parameters": "a parameter without a gradient would end the run in mid-step, and "
    "only where optimizer states are offloaded",
}
"""Keys that other DeepSpeed configurations have and that would do nothing or harm here, and why."""


def broken_additions(raw: Mapping[str, Any], stage: int) -> list[str]:
    """A sentence for every key of the raw section that is unknown, set by a section of ours, of another type, or
    without effect at ZeRO stage `stage`."""
    given = dict(_leaves(raw, ""))
    broken = [sentence for key, value in given.items() if (sentence := _broken(key, value, stage)) is not None]
    if not broken:
        broken = _without_effect(given)
    return broken


def uneven_partition(raw: Mapping[str, Any], world_size: int) -> str | None:
    """A sentence where the ranks do not fall into groups of zero_hpz_partition_size; DeepSpeed asserts it."""
    wanted = raw.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if world_size % min(wanted, world_size) == 0:
        return None
    return (
        f"{world_size} ranks do not fall into groups of deepspeed.zero_optimization.zero_hpz_partition_size = {wanted}"
    )


def _broken(key: str, value: Any, stage: int) -> str | None:
    addition = ADDITIONS.get(key)
    if addition is None:
        return _not_added(key)
    if not addition.takes(value):
        return f"deepspeed.{key} = {value!r} must be {addition.said}"
    if stage not in addition.stages:
        return f"deepspeed.{key} does nothing with zero.stage = {stage}: take {_any_of(addition.stages)}"
    return None


def _not_added(key: str) -> str:
    ours = next((section for name, section in OURS.items() if _is_in(key, name)), None)
    if ours is not None:
        return f"deepspeed.{key} is set by {ours}"
    reason = next((why for name, why in REFUSED.items() if _is_in(key, name)), None)
    if reason is not None:
        return f"deepspeed.{key} cannot be added: {reason}"
    inner = [name for name in ADDITIONS if name.startswith(f"{key}.")]
    if inner:
        return f"deepspeed.{key} is a section, it takes {', '.join(inner)}"
    near = difflib.get_close_matches(key, ADDITIONS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"these can: {', '.join(ADDITIONS)}"
    return f"deepspeed.{key} cannot be added ({hint})"


def _without_effect(given: Mapping[str, Any]) -> list[str]:
    """Keys that another key of the raw section switches off."""
    broken = []
    if not given.get("flops_profiler.enabled", False):
        broken += [
            f"deepspeed.{key} does nothing without deepspeed.flops_profiler.enabled=true"
            for key in given
            if key.startswith("flops_profiler.") and key != "flops_profiler.enabled"
        ]
    buckets, scatter = "zero_optimization.use_multi_rank_bucket_allreduce", "zero_optimization.reduce_scatter"
    if buckets in given and not given.get(scatter, True):
        broken.append(f"deepspeed.{buckets} does nothing with deepspeed.{scatter}=false")
    return broken


def _any_of(stages: tuple[int, ...]) -> str:
    *first, last = map(str, stages)
    return f"stage {', '.join(first)} or {last}" if first else f"stage {last}"


def _is_in(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
