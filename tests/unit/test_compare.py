"""Runs side by side: numbers, what differs, classes; what is refused; and what `report` reads of the data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from mf_scale.cli import main
from mf_scale.commands.report import source_counts
from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.rundir import RunDir
from mf_scale.tracking.report.compare import MOST_RUNS, as_text, differences, numbers, read_runs
from mf_scale.tracking.report.compare_page import comparison_charts, write_comparison
from tests.unit.histories import Maker
from tests.unit.pages import Page
from tests.unit.report_runs import EVIL, evaluated, troubled_run


def _run(folder: Path, config: str, *, steps: int = 100, better: float = 0.0, classes: int = 40) -> RunDir:
    run = troubled_run(folder, steps=steps)
    run.config.write_text(config)
    evaluated(run, classes=classes, better=better, pictures=0, step=steps)
    return run


@pytest.fixture
def pair(tmp_path: Path) -> list[RunDir]:
    first = _run(tmp_path / "a" / "run", f"run_dir: a\nseed: 0\ndata: {{train: x, tags: [1, 2]}}\nevil: '{EVIL}'\n")
    text = "run_dir: b\nseed: 1\ndata: {train: x, tags: [1, 3]}\nevil: '\x1b[31m'\n".replace("\x1b", "\\e")
    second = _run(tmp_path / "b" / "run", text.replace("'", '"'), steps=200, better=0.2)
    return [first, second]


def test_numbers_stand_side_by_side(pair: list[RunDir]) -> None:
    runs = read_runs(pair)
    assert [(run.letter, run.name) for run in runs] == [("A", "a/run"), ("B", "b/run")]
    told = numbers(runs)
    rows = [dict(zip(told.heads, row, strict=True)) for row in told.rows]
    assert [row["step"] for row in rows] == ["100/100", "200/100"]
    assert (
        rows[0]["mIoU val"] == f"{100 * json.loads((pair[0].report / 'evaluation-val.json').read_text())['mIoU']:.2f}"
    )
    assert float(rows[1]["mIoU val"]) > float(rows[0]["mIoU val"])
    assert [row["restarts"] for row in rows] == ["1", "1"] and rows[0]["state"] == "done"
    assert rows[0]["loss at 100"] == rows[1]["loss at 100"], "compared at a step that both have"
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])


def test_what_differs_is_told_and_nothing_else(pair: list[RunDir]) -> None:
    differ = dict(differences(read_runs(pair)))
    assert differ == {"seed": ["0", "1"], "data.tags": ["[1, 2]", "[1, 3]"], "evil": [EVIL, "\x1b[31m"]}


def test_versions_and_ranks_are_compared(tmp_path: Path) -> None:
    makers = [Maker(tmp_path / name) for name in ("a", "b")]
    for maker, torch in zip(makers, ("2.10", "2.11"), strict=True):
        maker.begun(0, versions={"torch": torch, "timm": "1"})
        maker.steps(3)
    assert differences(read_runs([maker.run for maker in makers])) == [("(torch)", ["2.10", "2.11"])]


def test_the_terminal_gets_text_that_cannot_steer_it(
    pair: list[RunDir], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert main(["compare", *(str(run.path) for run in pair), "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "?[31m" in out
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["run", "state", "step"] and lines[1].startswith("A a/run  done")
    assert any(line.split() == ["seed", "0", "1"] for line in lines) and lines[-1] == f"page: {page}"
    told = Page(page.read_text())
    told.check()
    for text in ("2 runs side by side", "A a/run, B b/run", "3 keys differ", EVIL, "The 20 classes that differ most",
                 "classes are better in B, 0 worse"):  # fmt: skip
        assert text in told.words, text
    assert told.html.count("<script") == 1 and "http" not in told.html.replace("http-equiv", "")


def test_a_run_has_one_colour_in_all_charts(pair: list[RunDir], tmp_path: Path) -> None:
    bare = Maker(tmp_path / "bare")
    bare.begun(0)
    bare.steps(9)
    charts = {chart.name: chart for chart in comparison_charts(read_runs([bare.run, *pair]))}
    assert [line.name for line in charts["loss"].lines] == ["A", "B", "C"]
    assert [bool(line.values) for line in charts["mIoU-val"].lines] == [False, True, True]
    assert [bool(line.values) for line in charts["speed"].lines] == [True, True, True]


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, "a: 1\n", classes=30 + 5 * i, better=0.3 * i) for i, name in enumerate("abc")]
    page = tmp_path / "x.html"
    assert main(["compare", *(str(run.path) for run in runs), "--out", str(page)]) == 0
    words = Page(page.read_text()).words
    assert "IoU A IoU B IoU C spread" in words and "the configurations are the same" not in words
    assert "The configurations are the same." in words


def test_runs_that_are_alike_say_so(tmp_path: Path) -> None:
    runs = read_runs([_run(tmp_path / name, "a: 1\n") for name in "ab"])
    assert "the configurations are the same" in as_text(runs)
    words = Page(write_comparison(runs, tmp_path / "x.html").read_text()).words
    assert "None of the 40 classes that were compared differs." in words


def _refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["compare", *arguments]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def test_mistakes_are_told(pair: list[RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (str(run.path) for run in pair)
    assert "1 run cannot be compared" in _refused([first], capsys)
    assert "named twice" in _refused([first, f"{first}/../run"], capsys)
    assert "no such run directory" in _refused([first, str(tmp_path / "none")], capsys)
    (tmp_path / "empty").mkdir()
    assert "nothing to compare" in _refused([first, str(tmp_path / "empty")], capsys)
    assert "does not exist" in _refused([first, second, "--out", str(tmp_path / "no" / "x.html")], capsys)
    assert "is a folder" in _refused([first, second, "--out", str(tmp_path)], capsys)
    config = pair[0].config.read_text()
    for out in (pair[0].config, tmp_path / "page"):
        assert "no name of a page" in _refused([first, str(tmp_path / "none"), "--out", str(out)], capsys), "at once"
    assert pair[0].config.read_text() == config and not (tmp_path / "page").exists()
    with pytest.raises(UserError, match="no name of a page"):
        write_comparison([], pair[0].config)
    pair[1].config.write_text("a: [1\n")
    assert "configuration cannot be read" in _refused([first, second], capsys)
    with pytest.raises(UserError, match="cannot be compared"):
        read_runs([RunDir(tmp_path / str(i)) for i in range(MOST_RUNS + 1)])


def test_the_data_of_a_run_is_counted_from_its_index(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mf_scale.commands.report._ROWS", 16)  # 40 rows in three pieces
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{train: {packed}/train}}\n")
    (counts,) = source_counts(config)
    index = Index.open(packed / "train")
    rows = [index.sample(i) for i in range(index.samples)]
    assert counts.samples == len(rows) and counts.bytes == sum(shard.size for shard in index.shards)
    assert list(counts.class_images) == [sum(k in row.class_ids for row in rows) for k in range(len(index.vocabulary))]
    assert sum(n * images for n, images in counts.segments.items()) == sum(row.segments for row in rows)
    assert all(counts.sizes[row.height, row.width] for row in rows) and sum(counts.sizes.values()) == len(rows)


def test_data_that_is_not_there_is_said(tmp_path: Path, packed: Path) -> None:
    assert source_counts(tmp_path / "config.yaml") == []
    config = tmp_path / "config.yaml"
    sources = [{"index": str(packed / "val"), "weight": 2.0}, {"index": str(tmp_path / "gone")}]
    config.write_text(json.dumps({"data": {"sources": sources}}))
    found, gone = source_counts(config)
    assert found.weight == 2.0 and not found.missing
    assert gone.missing == "there is no index of shards here" and gone.samples == 0
    config.write_text("unheard_of: 1\n")
    (unknown,) = source_counts(config)
    assert "unheard_of" in unknown.missing
