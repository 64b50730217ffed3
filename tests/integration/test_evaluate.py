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
    """All of it, the first samples of it, where one rank was asked to stop, and where one fails, on whatever it is."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[2]), prepend=":")
    source = painted_source(tmp_path)
    results: dict[int, dict[str, Any]] = {}
    pictures: dict[int, dict[str, bytes]] = {}
    parts: dict[int, dict[str, Any]] = {}
    for ranks in (1, 3):  # five samples: three ranks need a weight-0 repeat
        run = RunDir(tmp_path / f"run-{ranks}")
        run_ranks(SCRIPT, ranks, tmp_path, source.source, str(run.path))
        results[ranks] = json.loads((run.report / "evaluation-val.json").read_text())
        assert results[ranks].pop("images_per_second") > 0
        pictures[ranks] = {f.name: f.read_bytes() for f in run.report.glob("*.png")}
        parts[ranks] = json.loads((run.path / "part.json").read_text())
        (event,) = read_metrics(run.metrics)
        assert (event["event"], event["where"], event["AP"]) == ("evaluation", "command", results[ranks]["AP"])
    assert results[1] == results[3] and parts[1] == parts[3]
    assert pictures[1] == pictures[3] and len(pictures[1]) == 35, "those of the last evaluation, none of an earlier"
    assert 0.5 < results[1]["instances"]["boundary"]["AP"] <= results[1]["AP"] < 1
    assert results[1]["confusions"] and sorted(p["position"] for p in results[1]["pictures"]) == [0, 1, 2, 3, 4]
    part = parts[1]["results"]
    assert part["samples"] == 4 and part["mIoU"] != results[1]["mIoU"]
    assert sum(part["semantic"]["per_class"]["pixels"]) < sum(results[1]["semantic"]["per_class"]["pixels"])
    nobody, memory, large, picture = parts[1]["failures"][1:]
    assert parts[1]["failures"][0] == nobody == "UserError: an image that nobody can read"
    assert (
        memory == f"FaultError: sample {source.sample(2).key} could not be evaluated: RuntimeError: CUDA out of memory"
    )
    assert large == "FaultError: class number 1 could not be evaluated: MemoryError: a large class"
    assert picture == "UserError: cannot write: Is a directory"
