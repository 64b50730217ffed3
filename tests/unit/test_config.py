"""Configuration: strict, with messages that name the remedy."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from mf_scale.config.explain import schema_fields
from mf_scale.config.load import config_from_dict, config_to_dict, config_to_yaml, load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary, plan_batch, validate
from mf_scale.errors import UserError
from mf_scale.vocabulary import ClassInfo, Vocabulary

ROOT = Path(__file__).parents[2]


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(load_config(None, overrides))
    return str(caught.value)


def test_base_yaml_is_the_schema_with_every_key() -> None:
    assert load_config(ROOT / "configs/base.yaml") == Config()
    text = (ROOT / "configs/base.yaml").read_text()
    missing = [name for name, _ in schema_fields() if f"{name.split('.')[-1]}:" not in text]
    assert not missing


CONFIGURATIONS = [path for folder in ("configs", "docs") for path in sorted((ROOT / folder).rglob("*.yaml"))]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda p: p.name)
def test_every_config_is_sound_and_short(path: Path) -> None:
    validate(load_config(path))
    if path.name != "base.yaml":
        assert len(path.read_text().splitlines()) < 40


def test_every_field_has_a_docstring_and_a_reader() -> None:
    """No option that nothing reads."""
    code = "\n".join(
        p.read_text()
        for p in (ROOT / "mf_scale").rglob("*.py")
        if p.name not in ("schema.py", "model_schema.py", "train_schema.py", "validate.py")
    )
    unread = [name for name, _ in schema_fields() if f".{name.split('.')[-1]}" not in code]
    assert not unread
    files = [f"mf_scale/config/{name}schema.py" for name in ("", "model_", "train_")]
    schema = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    bare = [
        line
        for line, after in pairwise(schema)
        if line.startswith("    ") and ": " in line and " = " in line and '"""' not in after
    ]
    assert not bare


def test_overrides_beat_the_file_which_beats_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\ntrain: {steps: 1, micro_batch: 1}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\ntrain: {steps: 2, global_batch: 2}\n")
    config = load_config(tmp_path / "run.yaml", ["train.global_batch=3"])
    assert (config.seed, config.train.micro_batch, config.train.steps, config.train.global_batch) == (1, 1, 2, 3)


def test_effective_configuration_comes_back(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/demo.yaml", ["data.val=null", "optimizer.betas=[0.8,0.9]"])
    assert config_from_dict(config_to_dict(config), where="test") == config
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trian.steps=5", "Did you mean train.steps?"),
        ("train.stpes=5", "Did you mean train.steps?"),
        ("model.backbone.nam=x", "model.backbone.name"),
        ("train.steps=abc", "a whole number"),
        ("data.crop=[1,x]", "list of whole numbers"),
        ("model.num_classes=1.5", "whole number or null"),
        ("zero.stage=4", "it takes 0, 1, 2, 3"),
        ("data.task=panotic", "Did you mean panoptic?"),
        ("train=5", "train is a section"),
        ("train.steps", "is not key=value"),
        ("tracking.api_key=abcdef", "looks like a secret"),
        ("data.train=s3://me:pass@bucket/x", "password in its url"),
        ("data.train=${oc.env:HOME}", "reads the environment"),
        ("train.steps=0", "train.steps = 0 must be above 0"),
        ("optimizer.lr=.inf", "optimizer.lr = inf must be a finite number"),
        ("optimizer.backbone_multiplier=-1", "must not be negative"),
        ("model.decoder.heads=0", "model.decoder.heads = 0 must be above 0"),
        ("seed=99999999999999999999999", "seed = 99999999999999999999999 must be below 2**63"),
        ("data.crop=[32,32]", "each at least 64"),
        ("data.crop[0]=64", "Lists are given whole"),
        ("run_dir=''", "run_dir is empty"),
        ("run_dir=~/x", "~ is not expanded"),
        ("data.flip=1.5", "data.flip = 1.5 must lie in 0..1"),
        ("model.decoder.width=100", "not a multiple"),
        ("checkpoint.keep_last=1", "at least 2"),
        ("train.straggler_factor=1", "would name a rank that is like the others"),
        ("train.straggler_every=-1", "train.straggler_every = -1 must not be negative"),
        ("train.profile=[3]", "train.profile = [3] must be [first, last], steps from 1"),
        ("train.profile=[0,2]", "must be [first, last], steps from 1"),
        ("train.profile=[5,4]", "must be [first, last], steps from 1"),
        ("train.profile=[159999,160001]", "lies behind the last step, train.steps = 160000"),
        ("train.profile=[1,101]", "are 101 steps, whose trace would fill the memory: take 100 at most"),
        ("train.profile_ranks=[1]", "does nothing without train.profile"),
        ("eval.metrics_every_steps=-1", "eval.metrics_every_steps = -1 must not be negative"),
    ],
)
def test_mistakes_are_named_with_the_remedy(override: str, named: str) -> None:
    assert named in message(override)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.straggler_every=0", "train.straggler_factor=2"], "does nothing with train.straggler_every = 0"),
        (["eval.metrics_every_steps=0", "eval.metrics_samples=5"], "does nothing with eval.metrics_every_steps = 0"),
        (["train.profile=[1,2]", "train.profile_ranks=[-1]"], "must hold ranks, from 0"),
        (["train.profile=[1,2]", "train.profile_ranks=[]"], "must hold ranks, from 0"),
    ],
)
def test_settings_that_another_one_makes_void_are_named(overrides: list[str], named: str) -> None:
    assert named in message(*overrides)


def test_a_secret_is_never_repeated() -> None:
    assert "abcdef" not in message("tracking.api_key=abcdef")
    assert "pass@" not in message("data.train=s3://me:pass@bucket/x")


def test_all_broken_rules_are_said_at_once() -> None:
    text = message("train.steps=0", "data.flip=2", "data.crop=[8,8]")
    assert all(name in text for name in ("train.steps", "data.flip", "data.crop"))


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b", "train: [1"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(file)


def test_a_missing_file_shows_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("")
    with pytest.raises(UserError, match=r"holds: demo\.yaml"):
        load_config(tmp_path / "dmo.yaml")


def test_files_that_build_on_each_other_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(UserError, match="circle"):
        load_config(tmp_path / "a.yaml")


def test_batch_arithmetic() -> None:
    config = load_config(None, ["train.global_batch=12", "train.micro_batch=2"])
    plan = plan_batch(config, 3)
    assert plan.accumulation == 2
    assert plan.micro_batch * plan.accumulation * plan.world_size == plan.global_batch
    with pytest.raises(UserError, match=r"cannot be shared by 5 ranks.*1 or 2 or 3 or 4 or 6 or 12 ranks"):
        plan_batch(config, 5)
    assert (plan_batch(config, 4).micro_batch, plan_batch(config, 4).accumulation) == (1, 3)


def test_classes_against_the_vocabulary() -> None:
    vocabulary = Vocabulary("two", (ClassInfo("cat", True, 1), ClassInfo("sky", False, 2)))
    assert check_vocabulary(load_config(None), vocabulary, where="x") == 2
    with pytest.raises(UserError, match=r"num_classes = 3, but vocabulary 'two' has 2"):
        check_vocabulary(load_config(None, ["model.num_classes=3"]), vocabulary, where="x")


def test_sections_are_dataclasses_all_the_way() -> None:
    assert all(
        is_dataclass(getattr(Config(), f.name))
        for f in fields(Config)
        if f.name not in ("run_dir", "seed", "deepspeed")
    )


def test_sources_repeats_and_cache_are_checked() -> None:
    said = message("data.train=a", "data.sources=[{index: b}, {index: '', weight: 0}]", "data.repeat_threshold=2")
    for part in ("put all of them into data.sources", "sources[1].index is empty", "sources[1].weight = 0", "= 2 is a"):
        assert part in said
    assert "does nothing without data.cache_dir" in message("data.cache_gib=2")
    assert "0.25 at least" in message("data.cache_dir=/x", "data.cache_gib=0.1")
    assert "from 1e-6 to 1e6" in message("data.sources=[{index: a, weight: 1.0e+308}]")
    signed = message("data.sources=[{index: 's3://b/x?X-Amz-Signature=hunter2'}]")
    assert "holds credentials or a query" in signed and "hunter2" not in signed
    with_password = message("data.train=https://me:hunter2@host/x")
    assert "holds a password in its url" in with_password and "hunter2" not in with_password
    assert "'pipe:' are not read" in message("data.val=pipe:cat x")
