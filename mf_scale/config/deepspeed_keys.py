"""What the raw `deepspeed:` section may add to DeepSpeed's configuration, and what other sections set."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
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

ADDITIONS = (
    "communication_data_type",
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_optimization.allgather_partitions",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.ignore_unused_parameters",
    "zero_optimization.log_trace_cache_warnings",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_scatter",
    "zero_optimization.stage3_allgather_sequential",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_module_granularity_threshold",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.sub_group_size",
    "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_optimization.zero_hpz_partition_size",
)
"""Keys that the raw section may add; a test holds the names to the installed DeepSpeed."""


def broken_additions(raw: Mapping[str, Any]) -> list[str]:
    """A sentence for every key of the raw section that is unknown or set by a section of ours."""
    return [sentence for key in _leaves(raw, "") if (sentence := _broken(key)) is not None]


def _broken(key: str) -> str | None:
    ours = next((section for name, section in OURS.items() if _is_in(key, name)), None)
    if ours is not None:
        return f"deepspeed.{key} is set by {ours}"
    if any(_is_in(key, name) for name in ADDITIONS):
        return None
    near = difflib.get_close_matches(key, ADDITIONS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"these can: {', '.join(ADDITIONS)}"
    return f"deepspeed.{key} cannot be added ({hint})"


def _is_in(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
