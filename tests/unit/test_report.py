"""The report page: self-contained, complete, safe with any name, readable with many classes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from mf_scale.errors import UserError
from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import MetricsLog
from mf_scale.tracking.pictures import read_png
from mf_scale.tracking.report.data import SourceCounts
from mf_scale.tracking.report.page import headline, write_report
from mf_scale.tracking.report.wrong import Hang
from mf_scale.tracking.status import run_status
from tests.unit.histories import Maker
from tests.unit.pages import Page
from tests.unit.report_runs import EVIL, counted, evaluated, troubled_run


def _train(run: RunDir, steps: int = 60) -> None:
    """As an older program told it."""
    log = MetricsLog(run.metrics)
    log.write("start", 0, resumed=False, versions={"torch": "9.9"})
    for step in range(1, steps + 1):
        times = {"images_per_second": 17.0, "step_time": 0.4, "data_wait": 0.1}
        log.write("step", step, loss=9.0 / step, loss_class=1.0, lr=0.1, grad_norm=2.0, **times)
    log.close()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "my run")


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    run = troubled_run(tmp_path / "my run")
    run.config.write_text(f"seed: 0\nname: {EVIL}\n")
    for split in ("train", "val"):
        evaluated(run, split, classes=50)
    sources = [*counted(50), SourceCounts("s3://bucket/x", missing="there is no index of shards here")]
    hangs = [Hang("start-2", rank, 8, f"rank {rank} hangs: {EVIL}") for rank in range(6)]
    page = Page(write_report(run, sources, hangs).read_text())
    page.check()
    assert "http" not in page.html.replace("http-equiv", "")
    assert page.images == 2 * 4 * 2
    for text in (
        "my run", "Loss by decoder layer: means of the last 10 lines", "A step on average", "What went wrong",
        "3 starts", "Semantic: every pixel a class", "Instances: masks by their scores", "federated",
        "of boundaries 5 500 11.1",
        "By frequency band", "The 20 classes that cost mIoU most", "The 15 costliest confusions", "Pictures, train",
        "worst", "median", "scored by PQ", "Left out: s3://bucket/x: there is no index of shards here",
        "restarts", "torch 9.9", "seed: 0", EVIL, "0, 1, 2, 3 and 2 more of 8",
    ):  # fmt: skip
        assert text in page.words, text
    expected = {"loss", "loss-terms", "loss-layers", "metrics", "learning-rate", "gradient-norm", "speed", "memory"}
    expected |= {"matched", "step-time", "classes-train", "classes-val", "samples-train", "samples-val"}
    assert expected <= {f.stem for f in run.report.glob("*.png")}


def test_names_are_text_not_markup(run: RunDir) -> None:
    evaluated(run, classes=6)
    page = Page(write_report(run).read_text())
    page.check()
    assert EVIL in page.text and page.html.count("<script") == 1
    assert "k&<script>alert(1)</script>3" in page.text
    assert f'alt="ground truth of k&amp;{EVIL.replace("<", "&lt;").replace(">", "&gt;")}3"' in page.html


def test_a_split_cannot_write_elsewhere(run: RunDir) -> None:
    results = evaluated(run, classes=6, pictures=0)
    (run.report / "evaluation-val.json").write_text(json.dumps({**results, "split": "../../x"}))
    write_report(run)
    assert [f.name for f in run.path.parent.iterdir()] == ["my run"]
    assert (run.report / "classes-x.png").is_file()


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_each_task_has_its_metrics(run: RunDir, task: str) -> None:
    evaluated(run, classes=10, task=task)
    words = Page(write_report(run).read_text()).words
    assert ("Semantic: every pixel" in words) == (task != "instance")
    assert ("Panoptic: every pixel" in words) == (task != "semantic")
    assert ("Classes by AP" in words) == (task == "instance")


def test_an_evaluation_of_an_older_program_is_shown(run: RunDir) -> None:
    results = evaluated(run, classes=10, task="semantic", bands=False)
    old = {key: value for key, value in results.items() if key not in ("confusions", "picture_score", "AP")}
    old["pictures"] = [{k: v for k, v in one.items() if k not in ("why", "score")} for one in old["pictures"]]
    (run.report / "evaluation-val.json").write_text(json.dumps(old))
    page = Page(write_report(run).read_text())
    page.check()
    assert page.images == 8 and "confusions" not in page.words and "By frequency band" not in page.words


def test_confusions_that_were_too_many_are_said(run: RunDir) -> None:
    results = evaluated(run, classes=10, task="semantic", pictures=0)
    (run.report / "evaluation-val.json").write_text(json.dumps({**results, "confusions": None}))
    assert "Confusions were not counted" in Page(write_report(run).read_text()).words


def test_ten_thousand_classes_stay_small_and_readable(run: RunDir) -> None:
    evaluated(run, classes=10_000, pictures=0)
    began = time.process_time()
    html = write_report(run, counted(10_000)[:1]).read_text()
    assert time.process_time() - began < 20, "seconds of this process, whatever else runs"
    assert len(html.encode()) < 1_300_000
    page = Page(html)
    page.check()
    costly = html[html.index('id="costly-s-val"') : html.index("</table>", html.index('id="costly-s-val"'))]
    assert costly.count("<tr>") == 51
    before_folded = html[: html.index("<details>", html.index('id="classes-of-s-val"'))]
    assert before_folded.count("<tr>") < 100, "what is open is short"
    assert page.rows > 9000, "and every class is there without script"


def test_a_run_without_evaluation_says_what_to_do(run: RunDir) -> None:
    _train(run)
    page = Page(write_report(run).read_text())
    page.check()
    assert "Not evaluated yet" in page.words
    assert "tell the time of a step and the wait for data only" in page.words
    assert "Nothing was told" in page.words


def test_nothing_to_report_is_a_users_mistake(run: RunDir) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        write_report(run)


def test_a_picture_that_is_gone_is_left_out_with_a_word(run: RunDir) -> None:
    evaluated(run, classes=6)
    whole = write_report(run).read_text()
    sheet = read_png(run.report / "samples-val.png")
    (run.report / "val-00-image.png").unlink()
    page = write_report(run).read_text()
    assert page.count("<figure><img") == whole.count("<figure><img") - 1
    assert page.count("1 picture is missing: evaluate the run again") >= 1 and "is missing" not in whole
    assert len(read_png(run.report / "samples-val.png")) < len(sheet), "whole rows only"
    for picture in run.report.glob("val-*.png"):
        picture.unlink()
    assert "2 pictures are missing" in write_report(run).read_text()
    (run.report / "val-00-image.png").write_text("no picture")
    with pytest.raises(UserError, match=r"val-00-image\.png"):
        write_report(run)


def test_headline_counts_restarts_and_skipped_steps(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "run")
    maker.begun(0)
    maker.steps(7)
    maker.begun(4)
    records = [
        {"event": "start", "step": 0, "resumed": False},
        {"event": "step", "step": 1200, "loss": 2.0, "images_per_second": 10.0},
        {"event": "start", "step": 1200, "resumed": True},
        {"event": "skipped", "step": 1201},
        {"event": "step", "step": 1201, "loss": None, "images_per_second": 30.0},
    ]
    told = headline(records, [{"split": "val", "mIoU": 0.5, "PQ": None, "AP": 0.25}], run_status(maker.run))
    cards = {c["name"]: c["value"] for c in told}
    assert cards["mIoU, val"] == "50.0%" and "PQ, val" not in cards and cards["AP, val"] == "25.0%"
    assert (cards["restarts"], cards["steps skipped"], cards["training loss, last"]) == ("1", "1", "2")
    assert cards["steps lost to restarts"] == "3"
    assert cards["images/s, median"] == "20" and cards["steps"].replace("\u202f", "") == "1201"


def test_the_starts_are_on_the_page(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "run")
    maker.launched("7", 0, "node1", "node2", ranks=4)
    maker.begun(0, job="7", restart=0)
    maker.steps(4)
    maker.saved()
    maker.steps(7)
    maker.script_ended("7", 0, 137, "a rank <b> was killed by signal 9", "requeued")
    maker.passed(60)
    maker.launched("7", 1, "node1")
    maker.script_ended("7", 1, 75, "a fault of the surroundings", "requeued")
    maker.launched("7", 2, "node1")
    maker.begun(4, job="7", restart=2)
    maker.steps(9)
    html = write_report(maker.run).read_text()
    page = Page(html)
    for part in ("Starts", "2 restarts lost 3 steps (6 s)", "7.0", "node1, node2", "0 → 7", "7.1", "a fault of",
                 "a rank <b> was killed by signal 9", "1 min 02 s"):  # fmt: skip
        assert part in page.words, part
    assert "<title>start 2 goes on from step 4 after: a rank &lt;b&gt; was killed by signal 9; 3 steps lost" in html
    page.check()


def test_an_evaluation_without_a_run_has_no_starts(run: RunDir) -> None:
    evaluated(run, classes=6)
    words = Page(write_report(run).read_text()).words
    assert "Starts" not in words and "What went wrong" not in words


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_texts_and_curves_have_contrast_in_light_and_dark() -> None:
    """WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    style = (Path(__file__).parents[2] / "mf_scale/tracking/report/style.html").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.split("prefers-color-scheme")[:2])
    assert set(light) == set(dark)
    for colors in (light, dark):
        for ground in ("paper", "card"):
            for name in ("ink", "muted", "link"):
                assert _contrast(colors[name], colors[ground]) >= 4.5, (name, ground, colors[name])
            for name in (n for n in colors if n.startswith("series")):
                assert _contrast(colors[name], colors[ground]) >= 3, (name, ground, colors[name])
        assert _contrast(colors["ink"], colors["bar"]) >= 4.5
