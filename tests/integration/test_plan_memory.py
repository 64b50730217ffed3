"""What `mf-scale plan` computes, held to what a real run holds: states to the byte, activations within 15%."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mf_scale.config.load import load_config
from mf_scale.losses.choose import choose_criterion
from mf_scale.models.build import build_model
from mf_scale.plan.activations import Tracer
from mf_scale.plan.micro_batch import made_batch, one_pass
from tests.integration.ranks import run_ranks

SCRIPT = Path(__file__).with_name("plan_ranks.py")
CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PLAIN: list[Any] = [[0, [], 2], [1, [], 2], [2, [], 2], [2, [], 1], [3, [], 2, "ema.decay=0.9"]]
OFFLOADED: list[Any] = [
    [1, ["optimizer"], 2],
    [2, ["optimizer"], 2],
    [2, ["optimizer"], 1, "ema.decay=0.9"],
    [3, ["optimizer"], 2],
    [3, ["parameters"], 1],
    [3, ["optimizer", "parameters"], 2],
]
SMALL = 64 * 1024
"""Bytes of scalars and the like that DeepSpeed and torch keep beside."""


@pytest.fixture(scope="module", params=[1, 2])
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By scenario: ranks, the plan's numbers, and those of the rank that holds most, by name."""
    folder = tmp_path_factory.mktemp("plan")
    ranks = request.param
    scenarios = [*PLAIN, *OFFLOADED] if ranks == 2 else [*PLAIN[:3], PLAIN[4], OFFLOADED[1]]
    run_ranks(SCRIPT, ranks, folder, str(folder), json.dumps(scenarios), timeout=400)
    lines = [(folder / f"{ranks}-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    results = []
    for number, scenario in enumerate(scenarios):
        own = [json.loads(of_rank[number]) for of_rank in lines]
        assert [name for name, _ in own] == [scenario] * ranks
        most = {name: max(result["found"][name] for _, result in own) for name in own[0][1]["found"]}
        files = [result["files"] for _, result in own]
        results.append({**own[0][1], "ranks": ranks, "found": most, "files": files, "name": scenario})
    return results


def test_states_are_exact(counted: list[dict[str, Any]]) -> None:
    for result in counted:
        planned = {name: result["gpu"][name] + result["host"][name] for name in result["gpu"]}
        found, where = result["found"], (result["ranks"], result["name"])
        flattened = result["ranks"] == 1 and result["name"][:2] in ([1, []], [2, []])  # for a moment, at each reduction
        for name in ("weights", "master", "moments", "gradients", "average", *(() if flattened else ("buckets",))):
            assert found[name] == planned[name], (where, name)
        assert found["gathered"] == planned["gathered"], where


def test_files_of_a_checkpoint_are_exact(counted: list[dict[str, Any]]) -> None:
    """At every stage, offloaded or not, of every rank, on the disk."""
    for result in counted:
        first, *others = result["files"]
        found = {"first_rank": first, "other_rank": max(others, default=0), "total": first + sum(others)}
        assert found | {"stage": result["name"][0]} == result["written"], (result["ranks"], result["name"])


def test_nothing_large_is_forgotten(counted: list[dict[str, Any]]) -> None:
    """Before the first step, by counting every live tensor: what is there then is in the plan."""
    for result in counted:
        gpu, host, (stage, offload, *_) = result["gpu"], result["host"], result["name"]
        there = [what[name] for what in (gpu, host) for name in ("weights", "master", "moments", "average")]
        standing = gpu["gradients"] * (stage == 3) + gpu["buckets"] * (stage == 3) + host["buckets"]
        # The share of the gradients that the optimizer reads; sums over micro-batches come later.
        standing += {1: 1, 2: 1, 3: 2}[stage] * host["master"] if "optimizer" in offload else 0
        standing += gpu["buckets"] - 2 * 2**20 if stage in (1, 2) and "optimizer" in offload else 0
        assert 0 <= result["found"]["quiet"] - sum(there) - standing < SMALL, (result["ranks"], result["name"])


GRID: list[tuple[str, int, list[str]]] = [
    ("demo", 2, ["train.precision=bf16"]),
    ("ade20k_150/maskformer_resnet50", 1, ["train.precision=fp32", "model.backbone.recompute_stages=[1,2]"]),
    ("ade20k_150/maskformer_swin_tiny", 1, ["data.crop=[128,128]"]),
]
"""Configuration, micro-batch, overrides."""
MORE = [
    ("demo", 1, ["train.precision=bf16", "model.backbone.recompute_stages=[1,2,3,4]"]),
    ("demo", 4, ["model.backbone.recompute_stages=[1,2]"]),
    ("demo", 2, []),
    ("ade20k_150/maskformer_resnet50", 1, ["train.precision=fp32"]),
    ("ade20k_150/maskformer_resnet50", 2, []),
    ("ade20k_150/maskformer_resnet50", 2, ["model.backbone.recompute_stages=[1,2,3,4]"]),
    ("ade20k_150/maskformer_resnet50", 2, ["loss.points=1000"]),
    ("ade20k_150/maskformer_resnet50", 2, ["loss.kernels=eager"]),
    ("ade20k_150/maskformer_swin_tiny", 2, []),
    ("ade20k_150/maskformer_swin_tiny", 1, ["train.precision=fp32"]),
    ("ade20k_150/maskformer_swin_tiny", 1, ["model.backbone.recompute_stages=[1,2]"]),
    ("ade20k_150/maskformer_swin_tiny", 1, ["model.attention=reference"]),
    ("coco_stuff_10k/per_pixel_plus_resnet50", 2, []),
    ("coco_stuff_10k/per_pixel_resnet50", 2, ["train.precision=fp32"]),
    ("coco_panoptic/maskformer_resnet50", 1, ["train.precision=fp32"]),
]


def ratio(name: str, micro_batch: int, overrides: list[str]) -> float:
    """Computed peak of the activations over the measured one, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        crop = [] if name == "demo" else ["data.crop=[192,192]"]
        config = load_config(CONFIGS / f"{name}.yaml", ["model.backbone.weights=none", *crop, *overrides])
        computed = Tracer(config, segments=15, device="cpu")(micro_batch)
        classes = int(config.model.num_classes or 0)
        model = build_model(config.model, classes, seed=0).train()
        batch = made_batch(config, micro_batch, 15)
        measured = one_pass(model, choose_criterion(config, classes), batch, config.train.precision)
    finally:
        torch.set_num_threads(threads)
    return computed.peak / measured.peak


@pytest.mark.parametrize(("name", "micro_batch", "overrides"), GRID)
def test_activations_are_those_of_a_real_micro_batch(name: str, micro_batch: int, overrides: list[str]) -> None:
    assert ratio(name, micro_batch, overrides) == pytest.approx(1, abs=0.15)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "micro_batch", "overrides"), MORE)
def test_activations_over_many_configurations(name: str, micro_batch: int, overrides: list[str]) -> None:
    assert ratio(name, micro_batch, overrides) == pytest.approx(1, abs=0.15)
