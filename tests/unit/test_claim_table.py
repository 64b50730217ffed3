"""The tables of `mf-scale bench claim`: means, spreads, differences of the same seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mf_scale.bench.claim_table import claim_table, spread, summarise

ROOT = Path(__file__).parents[2]


def _run(kind: str, seed: int, val: float, rate: float = 0.1, **more: float | None) -> dict[str, Any]:
    part = {"mIoU": val, "seen": val, "seen_classes": 3, "classes": 4, "pixel_accuracy": 0.5}
    bands = {band: {"mIoU": more.get(band), "classes": 1} for band in ("rare", "common", "frequent")}
    return {
        "kind": kind, "seed": seed, "rate": rate, "loss": 1.0, "step_seconds": 0.5, "train": {**part, **bands},
        "val": {**part, **bands},
    }  # fmt: skip


def test_differences_are_of_the_same_seeds() -> None:
    runs = [_run("a", 0, 0.10), _run("a", 1, 0.30), _run("b", 1, 0.36), _run("b", 0, 0.12), _run("b", 2, 0.99)]
    models = {"a": {"parameters": 1_500_000, "gflop": 2.0}, "b": {"parameters": 2_000_000, "gflop": 3.0}}
    runs += [_run("a", 0, 0.5, rate=0.2), _run("a", 5, 0.7, rare=0.25)]
    rows = summarise(runs, 0.1, models, {"rare": 1, "common": 2})["rows"]
    difference = rows["b"]["val"]["mIoU"]["difference"]
    assert (difference["n"], difference["mean"]) == (2, pytest.approx(0.04))
    assert difference["deviation"] == pytest.approx(0.04 / 2**0.5)
    assert difference["error"] == pytest.approx(0.02)
    assert rows["a"]["val"]["mIoU"]["difference"] is None
    assert rows["a"]["val"]["mIoU"]["mean"] == pytest.approx(1.1 / 3), "the other rate is not among them"
    assert rows["a"]["val"]["rare"] == {**spread([0.25]), "difference": None}
    assert rows["b"]["val"]["rare"]["mean"] is None


def _lines(text: str) -> list[str]:
    """Without the spaces that only align."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_table_says_what_there_is() -> None:
    models = {"a": {"parameters": 1_500_000, "gflop": 2.0}, "b": {"parameters": 2_000_000, "gflop": 3.0}}
    told: dict[str, Any] = {"rate": 0.1, "models": models, "bands": {"rare": 1, "common": 2}}
    text = claim_table(summarise([_run("a", 0, 0.1, rare=0.2)], **told))
    assert "| a (1 seed) | 10.00 | 10.00 | 20.00 | - | - | 50.00 |" in _lines(text)
    assert "| b (0 seeds) | - | - | - | - | - | - |" in _lines(text)
    assert "Learning rates" not in text
    runs = [_run("a", 0, 0.1), _run("a", 1, 0.2), _run("b", 0, 0.3), _run("b", 1, 0.2), _run("b", 0, 0.25, rate=0.2)]
    lines = _lines(claim_table(summarise(runs, **told)))
    assert "| a (2 seeds) | 15.00 ± 7.07 | 15.00 ± 7.07 | - | - | - | 50.00 ± 0.00 |" in lines
    assert "| b - a | +10.00 ± 10.00 | +10.00 ± 10.00 | - | - | - | +0.00 ± 0.00 |" in lines
    assert "| b | held-out images | 30.00 | 25.00 |" in lines
    assert "| a | 1.50 | 2.00 | 0.50 | 1.00 ± 0.00 |" in lines
    assert lines[-1] != "" and any("held-out images 4, 3, 1, 1, 1;" in line for line in lines)
    assert "| a (0 seeds) | - | - | - | - | - | - |" in _lines(claim_table(summarise([], **told)))


def test_the_page_has_the_tables_of_its_numbers() -> None:
    page = (ROOT / "docs/claim.md").read_text().splitlines()
    table = claim_table(json.loads((ROOT / "docs/examples/claim.json").read_text()))
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 15 and all(line in page for line in rows)
