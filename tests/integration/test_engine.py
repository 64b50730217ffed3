"""The engine with real processes: same curve in every layout, exact resume in the same one, no dead steps.

All scenarios of a number of ranks run in one start of those ranks, since starting costs more than training here.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.integration.ranks import run_ranks

SCRIPT = Path(__file__).with_name("engine_ranks.py")
pytestmark = pytest.mark.integration

STAGES = (0, 1, 2, 3)
RANKS = (1, 2, 4)
PRECISIONS = ("fp32", "bf16", "fp16")
OFFLOADS = {1: ["optimizer"], 2: ["optimizer"], 3: ["optimizer", "parameters"]}
MICRO = {1: (8, 4, 2, 1), 2: (2, 4, 1, 2), 4: (1, 2, 2, 1)}
"""By ranks, the micro-batch of each stage: accumulation 1, 2, 4 and 8 in turn."""
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}
"""On weights of size 1 after 4 AdamW updates of 0.01, which are 0.04 at most. In fp32 layouts differ by the order of
additions alone (6e-8 was seen); in half precision, where a sum is cut into other parts, by its rounding (2e-3)."""
WRITTEN = [(stage, precision) for stage in STAGES for precision in PRECISIONS]
"""What two ranks save, go on with, and hand to one rank and to four at another stage."""


def tag(stage: int, precision: str) -> str:
    return f"z{stage} {precision}"


def scenarios_of(ranks: int) -> dict[str, Any]:
    """Everything a number of ranks does, by name."""
    scenarios: dict[str, Any] = {}
    for stage, precision in product(STAGES, PRECISIONS):
        here = {"stage": stage, "micro": MICRO[ranks][stage], "precision": precision}
        scenarios[f"{tag(stage, precision)} whole"] = {**here, "steps": [0, 5]}
        if precision == "fp32":
            scenarios[f"z{stage} poisoned"] = {**here, "steps": [0, 6], "poison": 5}
        if precision == "fp32" and stage in OFFLOADS:
            scenarios[f"z{stage} offloaded"] = {**here, "steps": [0, 5], "offload": OFFLOADS[stage]}
            scenarios[f"z{stage} offloaded poisoned"] = {**scenarios[f"z{stage} poisoned"], "offload": OFFLOADS[stage]}
        if precision == "fp16":
            scenarios[f"z{stage} overflowing"] = {**here, "steps": [0, 5], "scale": 65536.0}
        if ranks == 2:
            scenarios[f"{tag(stage, precision)} first"] = {**here, "steps": [0, 3], "save": tag(stage, precision)}
            scenarios[f"{tag(stage, precision)} second"] = {**here, "steps": [3, 5], "load": tag(stage, precision)}
        else:
            other = (stage + (1 if ranks == 1 else 2)) % 4
            moved = {**here, "stage": other, "micro": 2, "steps": [3, 5], "load": tag(stage, precision)}
            scenarios[f"{tag(stage, precision)} moved"] = moved
    return scenarios


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engine")
    found: dict[int, dict[str, Any]] = {}
    for ranks in (2, 1, 4):  # two ranks write what the others read
        scenarios = scenarios_of(ranks)
        run_ranks(SCRIPT, ranks, folder, str(folder), json.dumps(scenarios), timeout=400)
        lines = (folder / f"results-{ranks}.jsonl").read_text().splitlines()
        found[ranks] = dict(json.loads(line) for line in lines)
        assert found[ranks].keys() == scenarios.keys()
    return found


def difference(a: dict[str, Any], b: dict[str, Any], what: str = "weights") -> float:
    return max(abs(x - y) for x, y in zip(a[what], b[what], strict=True))


@pytest.mark.parametrize(("ranks", "stage", "precision"), list(product(RANKS, STAGES, PRECISIONS)))
def test_layouts_train_alike(results, ranks: int, stage: int, precision: str) -> None:
    reference, found = results[1][f"z0 {precision} whole"], results[ranks][f"{tag(stage, precision)} whole"]
    assert found["applied"] == reference["applied"]
    assert difference(reference, found) < TOLERANCE[precision]
    assert difference(reference, found, "average") < TOLERANCE[precision]
    assert found["averaged"] == pytest.approx(reference["averaged"], rel=0.01 if precision != "fp32" else 1e-4)
    for norms, wanted in zip(found["norms"], reference["norms"], strict=True):
        assert norms == pytest.approx(wanted, rel=1e-4 if precision == "fp32" else 0.02, nan_ok=True)


def test_an_average_is_not_the_weights(results) -> None:
    whole = results[1]["z0 fp32 whole"]
    assert max(abs(a - b) for a, b in zip(whole["average"], whole["weights"], strict=True)) > 1e-3


@pytest.mark.parametrize(("ranks", "stage"), list(product(RANKS, OFFLOADS)))
def test_offloading_changes_nothing_but_the_order_of_additions(results, ranks: int, stage: int) -> None:
    assert difference(results[1]["z0 fp32 whole"], results[ranks][f"z{stage} offloaded"]) < TOLERANCE["fp32"]


@pytest.mark.parametrize(("stage", "precision"), WRITTEN)
def test_resume_is_exact_in_the_same_layout(results, stage: int, precision: str) -> None:
    """Weights and average, bit for bit."""
    name = tag(stage, precision)
    whole = results[2][f"{name} whole"]
    assert results[2][f"{name} second"]["digest"] == whole["digest"]
    assert results[2][f"{name} first"]["digest"] != whole["digest"]


@pytest.mark.parametrize(("ranks", "stage", "precision"), list(product((1, 4), STAGES, PRECISIONS)))
def test_resume_goes_on_at_another_stage_on_other_ranks(results, ranks: int, stage: int, precision: str) -> None:
    name = tag(stage, precision)
    whole, moved = results[2][f"{name} whole"], results[ranks][f"{name} moved"]
    assert difference(whole, moved) < TOLERANCE[precision]
    assert difference(whole, moved, "average") < TOLERANCE[precision]


@pytest.mark.parametrize(("ranks", "stage"), list(product(RANKS, STAGES)))
def test_nan_on_one_rank_changes_nothing_anywhere(results, ranks: int, stage: int) -> None:
    poisoned = results[ranks][f"z{stage} poisoned"]
    assert poisoned["applied"] == [True] * 5 + [False]
    assert poisoned["digest"] == results[ranks][f"z{stage} fp32 whole"]["digest"]
    if stage in OFFLOADS:
        offloaded = results[ranks][f"z{stage} offloaded poisoned"]
        assert offloaded["applied"] == [True] * 5 + [False]
        assert offloaded["digest"] == results[ranks][f"z{stage} offloaded"]["digest"]


@pytest.mark.parametrize(("ranks", "stage"), list(product(RANKS, STAGES)))
def test_fp16_finds_its_loss_scale(results, ranks: int, stage: int) -> None:
    """From 65,536 it is halved until the gradients fit; those steps have no update, and the later ones all have."""
    applied = results[ranks][f"z{stage} overflowing"]["applied"]
    assert applied == sorted(applied)
    assert not applied[0]
    assert applied[-1]
