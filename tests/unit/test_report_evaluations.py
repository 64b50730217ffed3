"""Evaluation files that are not what `evaluate` writes: a paragraph that names the file, and no page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mf_scale.cli import main
from mf_scale.rundir import RunDir
from tests.unit.report_runs import evaluated


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "my run")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, None)
            for key in ("split", "samples", "step", "class_names", "things", "pictures", "images_per_second")
        ),
        *(("samples", "5"), ("class_names", ["a", 3]), ("class_names", []), ("things", [True])),
        *(("pictures", [{"key": "k"}]), ("pictures", [{"key": "k", "views": [{"title": "image"}]}])),
        *(("confusions", [{"truth": 0}]), ("confusions", [{"truth": 0, "predicted": 99, "pixels": 1, "share": 0.5}])),
        *(
            ("semantic", {}),
            ("semantic", []),
            ("panoptic", {"per_class": {}}),
            ("instances", {"per_class": {"AP": []}}),
        ),
        *(("bands", {"of_class": ["rare"]}), ("bands", {"of_class": ["rare"] * 10, "rare": 3}), ("mIoU", "high")),
    ],
)
def test_an_evaluation_of_another_shape_is_a_users_mistake(
    run: RunDir, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluated(run, classes=10)
    for changed in ({**results, key: value}, {name: results[name] for name in results if name != key}):
        if changed.keys() != results.keys() and value is not None:
            continue  # what has another value here may be absent
        file = run.report / "evaluation-val.json"
        file.write_text(json.dumps(changed))
        assert main(["report", str(run.path)]) == 2
        told = capsys.readouterr().err
        assert f"this is no evaluation: {key} is missing or of another kind (" in told and str(file) in told
        assert "Evaluate the run again, or remove the file." in told and "Traceback" not in told


@pytest.mark.parametrize("text", ["[]", "{", "7", '{"split": "val"}'])
def test_a_file_that_is_no_evaluation_is_refused_by_report_and_compare(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [RunDir(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        evaluated(run, classes=6, pictures=0)
    (runs[1].report / "evaluation-val.json").write_text(text)
    for words in (["report", str(runs[1].path)], ["compare", *(str(run.path) for run in runs)]):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert str(runs[1].report / "evaluation-val.json") in told and "or remove the file." in told
        assert "Traceback" not in told
