"""Evaluation on real processes: the same numbers and pictures for any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import read_metrics
from tests.integration.ranks import run_ranks
from tests.unit.painted import painted_source

SCRIPT = Path(__file__).with_name("evaluate_ranks.py")


@pytest.mark.integration
def test_any_number_of_ranks_gives_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[2]), prepend=":")
    source = painted_source(tmp_path).source
    results: dict[int, dict[str, Any]] = {}
    pictures: dict[int, dict[str, bytes]] = {}
    for ranks in (1, 3):  # five samples: three ranks need a weight-0 repeat
        run = RunDir(tmp_path / f"run-{ranks}")
        run_ranks(SCRIPT, ranks, tmp_path, str(source), str(run.path))
        results[ranks] = json.loads((run.report / "evaluation-val.json").read_text())
        assert results[ranks].pop("images_per_second") > 0
        pictures[ranks] = {f.name: f.read_bytes() for f in run.report.glob("*.png")}
        assert [r["event"] for r in read_metrics(run.metrics)] == ["evaluation"]
    assert results[1] == results[3]
    assert pictures[1] == pictures[3] and len(pictures[1]) == 12
