"""Our configuration -> DeepSpeed's dictionary. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mf_scale.config.schema import Config
from mf_scale.config.validate import BatchPlan


def deepspeed_dictionary(config: Config, plan: BatchPlan, *, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's dictionary for our configuration. Batch sizes are all given, so that it derives none.

    It neither clips nor measures gradients: `gradients.py` does both on the device, without waiting for the host.
    """
    settings: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "zero_optimization": _zero_section(config, plan, cuda),
        "gradient_clipping": 0.0,
        # Our AdamW is a subclass of torch's, which DeepSpeed's list of tested optimizers does not know.
        "zero_allow_untested_optimizer": True,
        # Its own Adam for offloaded states is compiled for up to a minute at first use.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        # Its throughput meter waits for the device twice a step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if config.train.precision != "fp32":
        # No "safe modules": gradients are reduced in fp32, only the computation is in half precision.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.train.precision]
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return _merged(settings, config.deepspeed)


def _zero_section(config: Config, plan: BatchPlan, cuda: bool) -> dict[str, Any]:
    zero, bucket = config.zero, config.zero.bucket_mib * 2**20 // 4
    section: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # The buffer is for reducing over ranks; a single one would copy every gradient into it for nobody.
        "contiguous_gradients": plan.world_size > 1 or zero.stage == 3 or zero.offload_optimizer,
        # Its own norm waits for the device; at stage 3 and of offloaded gradients it cannot be turned off.
        "compute_grad_norm": zero.stage not in (1, 2) or zero.offload_optimizer,
    }
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if zero.offload_parameters:
        section["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return section


def _merged(settings: dict[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in added.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
