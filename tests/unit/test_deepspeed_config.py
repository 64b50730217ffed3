"""Our configuration as DeepSpeed's, and the raw section beside it."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, Optional

import pytest
import torch

from mf_scale.config.deepspeed_keys import ADDITIONS, OURS, REFUSED
from mf_scale.config.load import config_from_dict, load_config
from mf_scale.config.validate import plan_batch, validate
from mf_scale.distributed.deepspeed_config import deepspeed_dictionary
from mf_scale.errors import UserError


def dictionary(*overrides: str, raw: dict[str, Any] | None = None) -> dict[str, Any]:
    config = load_config(None, list(overrides))
    if raw is not None:
        config = config_from_dict({"deepspeed": raw}, where="test")
    return deepspeed_dictionary(config, plan_batch(config, 1), cuda=False)


ZERO = "zero_optimization."


def zero_fields() -> dict[str, tuple[str, Any]]:
    """What the installed DeepSpeed's ZeRO section takes: key -> attribute and its type."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    return {ZERO + (field.alias or name): (name, field.annotation) for name, field in fields.items()}


def example(key: str) -> Any:
    """A value that is accepted, and is not DeepSpeed's default where it has more than one."""
    addition = ADDITIONS[key]
    if addition.kind is str:
        return addition.choices[-1] if addition.choices else "profile.txt"
    return {bool: True, int: 1000, float: 0.5}[addition.kind]


def section(keys: list[str]) -> dict[str, Any]:
    """A raw section with all of `keys`."""
    raw: dict[str, Any] = {}
    for key in keys:
        *outer, last = key.split(".")
        node = raw.setdefault(outer[0], {}) if outer else raw
        node[last] = example(key)
    return raw


def test_names_and_types_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime import config as theirs

    known = zero_fields()
    names = {name for name in (*ADDITIONS, *OURS, *REFUSED) if name.startswith(ZERO)}
    assert names <= set(known)
    for key in names & set(ADDITIONS):
        assert known[key][1] in (ADDITIONS[key].kind, Optional[ADDITIONS[key].kind]), key
    profiler = vars(DeepSpeedFlopsProfilerConfig({}))
    kinds = {f"flops_profiler.{n}": str if value is None else type(value) for n, value in profiler.items()}
    assert kinds == {key: a.kind for key, a in ADDITIONS.items() if key.startswith("flops_profiler.")}
    for choice in ADDITIONS["communication_data_type"].choices:
        assert theirs.get_communication_data_type({"communication_data_type": choice}) is not None
    rest = {key for key in ADDITIONS if "." not in key} - {"communication_data_type"}
    for key in rest:
        assert getattr(theirs, f"get_{key}")({key: "read"}) == "read"
        assert type(getattr(theirs, f"get_{key}")({})) is ADDITIONS[key].kind


def test_stages_are_those_whose_optimizer_takes_the_key() -> None:
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    flat = set(inspect.signature(DeepSpeedZeroOptimizer.__init__).parameters)
    sharded = set(inspect.signature(DeepSpeedZeroOptimizer_Stage3.__init__).parameters)
    gathering = inspect.getsource(partition_parameters)
    for key in (key for key in ADDITIONS if key.startswith(ZERO)):
        name = zero_fields()[key][0]
        at_3 = {name, f"zero_{name}"} & sharded or f"_ds_config.zero_config.{name}" in gathering
        found = {stage for stage, reads in ((1, name in flat), (2, name in flat), (3, at_3)) if reads}
        assert set(ADDITIONS[key].stages) == found, key


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_takes_every_addition(stage: int) -> None:
    """And has what was given: none is dropped or renamed on the way."""
    from deepspeed.runtime.config import DeepSpeedConfig

    keys = [key for key, addition in ADDITIONS.items() if stage in addition.stages]
    config = config_from_dict({"zero": {"stage": stage}, "deepspeed": section(keys)}, where="test")
    validate(config)
    taken = DeepSpeedConfig(deepspeed_dictionary(config, plan_batch(config, 1), cuda=False))
    known = zero_fields()
    for key in keys:
        if key.startswith(ZERO):
            assert getattr(taken.zero_config, known[key][0]) == example(key)
        elif key.startswith("flops_profiler."):
            assert getattr(taken.flops_profiler_config, key.partition(".")[2]) == example(key)
    assert taken.communication_data_type == torch.float16
    assert taken.memory_breakdown and taken.wall_clock_breakdown


@pytest.mark.parametrize("key", [key for key, addition in ADDITIONS.items() if addition.least > -math.inf])
def test_the_least_is_taken_and_what_is_below_is_not(key: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    addition = ADDITIONS[key]
    assert addition.takes(addition.least) and not addition.takes(addition.least - 1)
    if key.startswith(ZERO):
        DeepSpeedZeroConfig(**{key.removeprefix(ZERO): addition.least})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_takes_the_dictionary(stage: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    offload = ["zero.offload_optimizer=true"] if stage else []
    offload += ["zero.offload_parameters=true"] if stage == 3 else []
    for extra in ([], offload, ["train.precision=fp16"]):
        made = dictionary(f"zero.stage={stage}", *extra)
        taken = DeepSpeedConfig(made)
        assert taken.zero_optimization_stage == stage
        assert taken.gradient_clipping == 0
        assert taken.torch_autocast_enabled == ("torch_autocast" in made)


def test_the_raw_section_adds() -> None:
    raw = {"zero_optimization": {"overlap_comm": True}, "flops_profiler": {"enabled": True}}
    made = dictionary(raw=raw)
    assert made["zero_optimization"]["overlap_comm"] is True
    assert made["zero_optimization"]["stage"] == 2  # what stood there stays
    assert made["flops_profiler"] == {"enabled": True}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, "is set by zero.stage"),
        ({"bf16": {"enabled": True}}, "is set by train.precision"),
        ({"train_batch_size": 3}, "is set by train.global_batch"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, "is set by optimizer"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
        ({"nonsense": 1}, "cannot be added (these can: communication_data_type"),
        ({"flops_profiler": {"nonsense": 1}}, "deepspeed.flops_profiler.nonsense cannot be added"),
        ({"flops_profiler": True}, "is a section, it takes flops_profiler.enabled, flops_profiler.detailed"),
        ({"zero_optimization": None}, "deepspeed.zero_optimization is a section, it takes "),
        (
            {"comms_logger": {"enabled": True}},
            "comms_logger.enabled cannot be added: its numbers go to DeepSpeed's log",
        ),
        ({"prescale_gradients": True}, "cannot be added: DeepSpeed refuses it at some stages"),
        ({"gradient_predivide_factor": 2.0}, "cannot be added: DeepSpeed refuses it at some stages"),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, "overlap_comm = 'maybe' must be true or false"),
        ({"zero_optimization": {"overlap_comm": 1}}, "overlap_comm = 1 must be true or false"),
        ({"zero_optimization": {"overlap_comm": None}}, "overlap_comm = None must be true or false"),
        ({"zero_optimization": {"overlap_comm": {"x": 1}}}, "overlap_comm.x cannot be added"),
        ({"communication_data_type": "bf32"}, "= 'bf32' must be one of fp32, bf16, fp16"),
        ({"flops_profiler": {"enabled": True, "profile_step": True}}, "True must be a whole number from 1"),
        ({"flops_profiler": {"enabled": True, "recompute_fwd_factor": math.inf}}, "inf must be a number from 0"),
        ({"flops_profiler": {"profile_step": 3}}, "profile_step does nothing without deepspeed.flops_profiler.enabled"),
        (
            {"zero_optimization": {"reduce_scatter": False, "use_multi_rank_bucket_allreduce": False}},
            "use_multi_rank_bucket_allreduce does nothing with deepspeed.zero_optimization.reduce_scatter=false",
        ),
        (
            {"zero_optimization": {"stage3_max_live_parameters": 10}},
            "stage3_max_live_parameters does nothing with zero.stage = 2: take stage 3",
        ),
    ],
)
def test_the_raw_section_cannot_contradict_or_invent(raw: dict[str, Any], said: str) -> None:
    config = config_from_dict({"deepspeed": raw}, where="test")
    with pytest.raises(UserError, match=re.escape(said)):
        validate(config)


@pytest.mark.parametrize(
    ("stage", "key", "said"),
    [
        (0, "overlap_comm", "take stage 1, 2 or 3"),
        (0, "reduce_scatter", "take stage 1, 2 or 3"),
        (3, "use_multi_rank_bucket_allreduce", "take stage 1 or 2"),
        (1, "sub_group_size", "take stage 3"),
    ],
)
def test_a_key_is_refused_at_a_stage_that_does_not_read_it(stage: int, key: str, said: str) -> None:
    raw = {"zero": {"stage": stage}, "deepspeed": section([ZERO + key])}
    with pytest.raises(
        UserError, match=re.escape(f"deepspeed.{ZERO}{key} does nothing with zero.stage = {stage}: {said}")
    ):
        validate(config_from_dict(raw, where="test"))


def test_ranks_that_do_not_fall_into_groups_are_refused() -> None:
    raw = {"zero": {"stage": 3}, "deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    config = config_from_dict({**raw, "train": {"global_batch": 12}}, where="test")
    assert [plan_batch(config, world).world_size for world in (1, 2, 4)] == [1, 2, 4]
    with pytest.raises(UserError, match=r"3 ranks do not fall into groups of .*zero_hpz_partition_size = 2"):
        plan_batch(config, 3)


def test_the_raw_section_comes_from_the_command_line_too() -> None:
    made = dictionary("deepspeed.zero_optimization.overlap_comm=true")
    assert made["zero_optimization"]["overlap_comm"] is True
