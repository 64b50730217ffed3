"""Grids: which runs they are, what they are called, and what is refused before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mf_scale.cluster.grid import Run, check_runs, read_grid, run_config, run_name
from mf_scale.errors import UserError

BASE = Path(__file__).parents[2] / "configs/base.yaml"
GIVEN = ["data.train=/data", "run_dir=runs/sweep"]


def grid(folder: Path, text: str) -> Path:
    (folder / "grid.yaml").write_text(text)
    return folder / "grid.yaml"


def names(folder: Path, text: str) -> list[str]:
    return [run.name for run in read_grid(grid(folder, text))]


def test_a_mapping_is_every_combination_and_a_list_is_one_run_a_line(tmp_path):
    product = "optimizer.lr: [1e-4, 6e-5]\ndata.crop: [[512, 512], [640, 640]]\n"
    assert names(tmp_path, product) == [
        "lr-0.0001_crop-512x512", "lr-0.0001_crop-640x640", "lr-6e-05_crop-512x512", "lr-6e-05_crop-640x640",
    ]  # fmt: skip
    lines = "- {optimizer.lr: 1e-4}\n- {optimizer.lr: 6e-5, schedule.warmup_updates: 1500, model.num_classes: null}\n"
    assert names(tmp_path, lines) == ["lr-0.0001", "lr-6e-05_warmup-updates-1500_num-classes-none"]


def test_values_reach_the_configuration_as_they_are(tmp_path):
    text = """
- {optimizer.lr: 1e-4, data.crop: [640, 512], tracking.name: "12", train.tf32: false}
- {data.cache_dir: null, tracking.name: 'a b, [c]: "d" # e', optimizer.betas: [0.9, 1e-1]}
- {deepspeed.zero_optimization.reduce_scatter: false}
"""
    runs = read_grid(grid(tmp_path, text))
    first, second, third = (run_config(run, BASE, GIVEN) for run in runs)
    assert (first.optimizer.lr, first.data.crop, first.tracking.name, first.train.tf32) == (
        1e-4,
        [640, 512],
        "12",
        False,
    )
    assert (second.data.cache_dir, second.tracking.name) == (None, 'a b, [c]: "d" # e')
    assert second.optimizer.betas == [0.9, 0.1]
    assert third.deepspeed == {"zero_optimization": {"reduce_scatter": False}}


def test_names_stay_when_the_grid_grows(tmp_path):
    small = names(tmp_path, "loss.class_weight: [1.0, 2.0]\nloss.focal_weight: [5]\n")
    large = names(tmp_path, "loss.class_weight: [0.5, 1.0, 2.0]\nloss.focal_weight: [5, 10]\n")
    assert set(small) < set(large) and small == ["loss.class-weight-1_loss.focal-weight-5",
                                                 "loss.class-weight-2_loss.focal-weight-5"]  # fmt: skip
    # Two keys that end alike are told apart.
    assert len(set(names(tmp_path, "- {loss.class_weight: 1}\n- {matching.class_weight: 1}\n"))) == 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def canonical(value: Any) -> Any:
    """1 and 1.0 are one value, as they are in the configuration; 1 and true are two."""
    if isinstance(value, list):
        return [canonical(item) for item in value]
    return value if isinstance(value, bool) or not isinstance(value, int) else float(value)


@given(st.lists(VALUES, min_size=2, max_size=2), st.sampled_from([{}, {"data.cache_dir": "x" * 90, "data.val": "y"}]))
def test_names_are_safe_and_differ_where_values_do(values, more):
    told = [run_name({**more, "tracking.name": value, "train.init_from": value}) for value in values]
    for name in told:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,95}", name), name
    if repr(canonical(values[0])) != repr(canonical(values[1])):
        assert told[0] != told[1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("optimizer.ler: [1]", "Did you mean optimizer.lr"),
        ("optimizer: [1]", "write the whole key, for example optimizer.lr"),
        ("optimizer: {lr: [1]}", r"write the whole key: optimizer\.lr"),
        ("optimizer.lr: 1", "must hold a list"),
        ("optimizer.lr: []", "must hold a list"),
        ("run_dir: [a, b]", "run_dir cannot vary"),
        ("optimizer.lr: [1e-4, 0.0001]", "runs 0 and 1 are the same"),
        ("- {optimizer.lr: 1}\n- {}", "names no runs"),
        ("", "names no runs"),
        ("a: [", "is not YAML"),
        ("seed: " + str(list(range(2000))), "2,000 runs"),
    ],
)
def test_mistakes_in_a_grid_are_said(tmp_path, text, wanted):
    with pytest.raises(UserError) as caught:
        read_grid(grid(tmp_path, text))
    assert re.search(wanted, str(caught.value), re.IGNORECASE), str(caught.value)
    assert "grid.yaml" in str(caught.value)


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_grid(tmp_path / "no.yaml")


def test_every_run_is_checked_before_one_starts(tmp_path):
    file = grid(tmp_path, "train.precision: [bf16, fp8]\n")
    with pytest.raises(UserError, match=r"(?s)fp8.*run 1: precision-fp8"):
        check_runs(read_grid(file), file, BASE, GIVEN)
    file = grid(tmp_path, "data.crop: [[512, 512], [8, 8]]\n")
    with pytest.raises(UserError, match=r"(?s)at least 64.*run 1"):
        check_runs(read_grid(file), file, BASE, GIVEN)
    file = grid(tmp_path, "optimizer.lr: [1, 2]\n")
    with pytest.raises(UserError, match=r"optimizer\.lr varies in the grid, and is given"):
        check_runs(read_grid(file), file, BASE, [*GIVEN, "optimizer.lr=3"])
    assert check_runs(read_grid(file), file, BASE, GIVEN) == "runs/sweep"


def test_overrides_are_words_that_yaml_reads_back():
    run = Run("x", {"tracking.name": "a: b", "data.crop": [1, 2], "ema.decay": 1e-7, "data.val": None})
    read = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in run.overrides())}
    assert read["tracking.name"] == "a: b" and read["data.crop"] == [1, 2] and read["data.val"] is None
    assert float(read["ema.decay"]) == 1e-7
