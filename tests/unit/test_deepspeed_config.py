"""Our configuration as DeepSpeed's, and the raw section beside it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mf_scale.config.deepspeed_keys import ADDITIONS, OURS
from mf_scale.config.load import config_from_dict, load_config
from mf_scale.config.validate import plan_batch, validate
from mf_scale.distributed.deepspeed_config import deepspeed_dictionary
from mf_scale.errors import UserError


def dictionary(*overrides: str, raw: dict[str, Any] | None = None) -> dict[str, Any]:
    config = load_config(None, list(overrides))
    if raw is not None:
        config = config_from_dict({"deepspeed": raw}, where="test")
    return deepspeed_dictionary(config, plan_batch(config, 1), cuda=False)


def test_every_name_is_one_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {str(field.alias) for field in fields.values() if field.alias}
    ours = {name.split(".")[1] for name in (*ADDITIONS, *OURS) if name.startswith("zero_optimization.")}
    assert ours <= known


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
    raw = {"zero_optimization": {"overlap_comm": True, "sub_group_size": 10}, "comms_logger": {"enabled": True}}
    made = dictionary(raw=raw)
    assert made["zero_optimization"]["overlap_comm"] is True
    assert made["zero_optimization"]["stage"] == 2  # what stood there stays
    assert made["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, "is set by zero.stage"),
        ({"bf16": {"enabled": True}}, "is set by train.precision"),
        ({"train_batch_size": 3}, "is set by train.global_batch"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, "is set by optimizer"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
        ({"nonsense": 1}, "cannot be added (these can: communication_data_type"),
    ],
)
def test_the_raw_section_cannot_contradict_or_invent(raw: dict[str, Any], said: str) -> None:
    config = config_from_dict({"deepspeed": raw}, where="test")
    with pytest.raises(UserError, match=re.escape(said)):
        validate(config)


def test_the_raw_section_comes_from_the_command_line_too() -> None:
    made = dictionary("deepspeed.zero_optimization.overlap_comm=true")
    assert made["zero_optimization"]["overlap_comm"] is True
