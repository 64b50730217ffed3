"""The report page and its pictures: self-contained, complete, safe with any class name, readable with many classes."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mf_scale.errors import UserError
from mf_scale.evaluation.metrics import PanopticCounts, SemanticCounts
from mf_scale.rundir import RunDir
from mf_scale.tracking.charts import MOST_NAMES, MOST_POINTS, Chart, Line, Mark, draw
from mf_scale.tracking.metrics import MetricsLog
from mf_scale.tracking.pictures import Segmentation, add_legend, class_color, draw_segments, plain, write_png
from mf_scale.tracking.report import headline, training_charts, write_report
from mf_scale.tracking.status import run_status
from tests.unit.histories import Maker


def _train(run: RunDir, steps: int = 60) -> None:
    log = MetricsLog(run.metrics)
    log.write("start", 0, resumed=False, versions={"torch": "9.9"})
    for resumed_at in (0, steps // 2):
        if resumed_at:
            log.write("start", resumed_at, resumed=True, versions={"torch": "9.9"})
        for step in range(resumed_at + 1, steps + 1):
            terms = {"loss_class": 1.0, "loss_focal": 0.5, "loss_dice": 0.2}
            log.write(
                "step", step, loss=9.0 / step, **terms, lr=0.1, grad_norm=2.0, images_per_second=17.0, step_time=0.4
            )
            if step % 20 == 0:
                log.write("validation", step, loss=4.0)
    log.write("skipped", steps)
    log.close()


def _evaluated(run: RunDir, split: str, names: list[str], *, task: str = "panoptic", pictures: int = 1) -> None:
    generator = np.random.default_rng(0)
    classes, things = len(names), [i % 2 == 0 for i in range(len(names))]
    semantic, panoptic = SemanticCounts(classes), PanopticCounts(classes, things)
    truth = generator.integers(0, classes, (60, 80))
    found = np.where(generator.random(truth.shape) < 0.7, truth, (truth + 1) % classes)
    semantic.update(found, truth)
    panoptic.update(found, range(classes), truth, range(classes), [False] * classes)
    image = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
    write_png(run.report / f"{split}-00-image.png", plain(image))
    shown = [
        {"title": "image", "file": f"{split}-00-image.png"},
        {"title": "ground truth", "file": f"{split}-00-image.png"},
    ]
    results: dict[str, Any] = {
        "split": split, "step": 60, "samples": 5, "mIoU": None, "PQ": None, "class_names": names, "things": things,
        "pictures": [{"key": "k&1", "views": shown}] * pictures,
    }  # fmt: skip
    if task != "instance":
        results |= {"semantic": semantic.results(), "mIoU": semantic.results()["mIoU"]}
    if task != "semantic":
        results |= {"panoptic": panoptic.results(), "PQ": panoptic.results()["all"]["PQ"]}
    (run.report / f"evaluation-{split}.json").write_text(json.dumps(results))


class _Page(HTMLParser):
    """Text, images and everything that would load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.images = "", 0
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.images += tag == "img"
        for name in ("src", "href", "srcset", "data"):
            value = given.get(name) or given.get(f"xlink:{name}") or ""
            if value and not value.startswith(("data:", "#")):
                self.loads.append(value)
        if tag in ("script", "link", "iframe", "object"):
            self.loads.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "my run")


def test_the_page_is_whole_and_loads_nothing(run: RunDir) -> None:
    _train(run)
    run.config.write_text("seed: 0\n")
    for split in ("train", "val"):
        _evaluated(run, split, ["cat", "dog", "sky"])
    html = write_report(run).read_text()
    page = _Page(html)
    assert page.loads == [] and "@import" not in html and not re.search(r"url\((?!['\"]?#)", html)
    assert page.images == 4
    for text in (
        "my run",
        "Training",
        "Metrics",
        "Classes, val",
        "Pictures, train",
        "restarts",
        "torch 9.9",
        "seed: 0",
    ):
        assert text in page.text, text
    expected = {"loss", "loss-terms", "learning-rate", "gradient-norm", "speed", "step-time"}
    expected |= {"classes-train", "classes-val", "samples-train", "samples-val"}
    assert expected <= {f.stem for f in run.report.glob("*.png")}


def test_class_names_are_text_not_markup(run: RunDir) -> None:
    _evaluated(run, "val", ["<script>alert(1)</script>", 'a"b', "c&d"])
    html = write_report(run).read_text()
    assert "<script" not in html and _Page(html).loads == []
    assert "<script>alert(1)</script>" in _Page(html).text


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_each_task_has_its_metrics(run: RunDir, task: str) -> None:
    _evaluated(run, "val", ["cat", "dog", "sky"], task=task)
    text = _Page(write_report(run).read_text()).text
    assert ("mIoU" in text.split("In percent")[0]) == (task != "instance")
    assert ("panoptic, all" in text) == (task != "semantic")


def test_a_thousand_classes_stay_readable(run: RunDir) -> None:
    _evaluated(run, "val", [f"class {i}" for i in range(1000)], pictures=0)
    html = write_report(run).read_text()
    assert html.count('class="bar"') == 40
    assert "The 20 best" in html and "The 20 worst" in html
    assert len(html) < 1_000_000


def test_of_equally_bad_classes_the_most_frequent_comes_last(run: RunDir) -> None:
    _evaluated(run, "val", ["large", "good", "small"], task="semantic", pictures=0)
    file = run.report / "evaluation-val.json"
    results = json.loads(file.read_text())
    results["semantic"]["per_class"] = {"IoU": [0.0, 0.9, 0.0], "pixels": [90, 5, 5]}
    file.write_text(json.dumps(results))
    bars = re.findall(r'<div class="bar"><span title="(\w+)"', write_report(run).read_text())
    assert bars == ["good", "small", "large"]


def test_a_run_without_evaluation_says_what_to_do(run: RunDir) -> None:
    _train(run)
    assert "Not evaluated yet" in _Page(write_report(run).read_text()).text


def test_nothing_to_report_is_a_users_mistake(run: RunDir) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        write_report(run)


def test_a_picture_that_is_gone_is_a_users_mistake(run: RunDir) -> None:
    _evaluated(run, "val", ["cat", "dog", "sky"])
    (run.report / "val-00-image.png").unlink()
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
    told = headline(records, [{"split": "val", "mIoU": 0.5, "PQ": None}], run_status(maker.run))
    cards = {c["name"]: c["value"] for c in told}
    assert cards["mIoU, val"] == "50.0%" and "PQ, val" not in cards
    assert (cards["restarts"], cards["steps skipped"], cards["training loss, last"]) == ("1", "1", "2")
    assert cards["steps lost to restarts"] == "3"
    assert cards["images/s, median"] == "20" and cards["steps"].replace("\u2009", "") == "1201"


def test_charts_show_what_was_logged_and_the_resumes() -> None:
    records: list[dict[str, Any]] = [{"event": "step", "step": i, "loss": 1.0 if i % 2 else None} for i in range(10)]
    records += [{"event": "validation", "step": 9, "loss": 2.0}]
    marks = [Mark(4, "2", "resumed")]
    (chart,) = training_charts(records, marks)
    assert [line.name for line in chart.lines] == ["training", "validation"] and chart.resumes == marks
    assert chart.lines[0].steps == [1, 3, 5, 7, 9], "a loss that was not finite is null and is left out"


def test_a_chart_is_sound_svg_in_the_pages_colours() -> None:
    steps = list(range(5000))
    lines = [Line("a", steps, [1.0 + s for s in steps]), Line("b", steps[:3], [1.0, 3.0, 2.0], points=True)]
    svg, png = draw(Chart("x", "A <chart>", "s", lines, [Mark(100, "2", "after <this>")], log=True))
    ET.fromstring(svg)
    assert "var(--series-0)" in svg and "var(--ink)" in svg and "#2f6fde" not in svg
    assert "<title>after &lt;this&gt;</title>" in svg and ">2</text>" in svg
    assert png.startswith(b"\x89PNG")
    longest = max(len(path) for path in re.findall(r'd="([^"]*)"', svg))
    assert longest < MOST_POINTS * 40


def test_many_marks_keep_their_texts_and_lose_their_names() -> None:
    marks = [Mark(step, f"start {step}", f"text of {step}") for step in range(MOST_NAMES + 1)]
    svg, _ = draw(Chart("x", "t", "", [Line("a", [0, 20], [1.0, 2.0])], marks))
    assert svg.count("<title>text of ") == len(marks) and "start 3" not in svg
    svg, _ = draw(Chart("x", "t", "", [Line("a", [0, 20], [1.0, 2.0])], marks[:-1]))
    assert "start 3" in svg


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
    page = _Page(html)
    text = " ".join(page.text.split())
    for part in ("Starts", "2 restarts lost 3 steps (6 s)", "7.0", "node1, node2", "0 → 7", "7.1", "a fault of",
                 "a rank <b> was killed by signal 9", "1 min 02 s"):  # fmt: skip
        assert part in text, part
    assert "<title>start 2 goes on from step 4 after: a rank &lt;b&gt; was killed by signal 9; 3 steps lost" in html
    assert page.loads == []


def test_an_evaluation_without_a_run_has_no_starts(run: RunDir) -> None:
    _evaluated(run, "val", ["cat", "dog", "sky"])
    assert "Starts" not in _Page(write_report(run).read_text()).text


def test_class_colours_are_fixed_and_neighbours_differ() -> None:
    colors = [class_color(k) for k in range(1000)]
    assert colors[:2] == [class_color(0), class_color(1)]
    assert all(0 <= c <= 255 for color in colors for c in color)
    apart = [np.abs(np.subtract(a, b)).max() for a, b in itertools.pairwise(colors)]
    assert min(apart) > 40
    assert len(set(colors[:200])) == 200


def test_truth_and_prediction_paint_a_class_alike() -> None:
    image = np.full((40, 40, 3), 128, dtype=np.uint8)
    left = np.where(np.arange(40) < 20, 0, -1)[None].repeat(40, axis=0)
    truth = draw_segments(image, Segmentation(left, np.array([3])), list("abcdef"))
    found = draw_segments(image, Segmentation(left + 1 - (left < 0), np.array([5, 3])), list("abcdef"))
    assert np.array_equal(truth, found)
    corner, void = truth[5, 5].astype(int), truth[5, -5].astype(int)
    assert np.abs(corner - (0.6 * np.array(class_color(3)) + 0.4 * 128)).max() <= 1
    assert np.ptp(void) == 0, "void is grey"


def test_names_are_written_on_segments_large_enough() -> None:
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    segment_map = np.zeros((100, 100), dtype=int)
    segment_map[:3, :3] = 1
    names = ["large", "tiny"]
    named = draw_segments(image, Segmentation(segment_map, np.array([0, 1])), names)
    only_one = draw_segments(image, Segmentation(segment_map, np.array([0, 1])), ["large", "another name"])
    unnamed = draw_segments(image, Segmentation(segment_map, np.array([0, 1])), ["", "tiny"])
    assert np.array_equal(named, only_one) and not np.array_equal(named, unnamed)


def test_pictures_of_any_shape_are_drawn() -> None:
    for height, width in ((1, 1), (3, 900), (900, 3)):
        image = np.zeros((height, width, 3), dtype=np.uint8)
        drawn = draw_segments(
            image, Segmentation(np.zeros((height, width), int), np.array([0])), ["a very long name " * 9]
        )
        assert max(drawn.shape[:2]) == 640 and drawn.dtype == np.uint8
    empty = draw_segments(np.zeros((9, 9, 3), np.uint8), Segmentation(np.full((9, 9), -1), np.array([], int)), [])
    assert np.ptp(empty) == 0


def test_the_legend_names_every_colour() -> None:
    picture = np.zeros((50, 300, 3), dtype=np.uint8)
    with_legend = add_legend(picture, [0, 1, 2], ["cat", "dog", "sky"])
    assert with_legend.shape[1] == 300 and with_legend.shape[0] > 50
    for label in range(3):
        assert (with_legend[50:] == class_color(label)).all(-1).any()
    assert np.array_equal(add_legend(picture, [], []), picture)


def test_png_files_keep_their_values(tmp_path: Path) -> None:
    color = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "new" / "c.png", color)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "c.png")), color)
    ids = np.array([[0, 1, 65534]], dtype=np.uint16)
    write_png(tmp_path / "m.png", ids)
    assert np.array_equal(np.asarray(cv2.imread(str(tmp_path / "m.png"), cv2.IMREAD_UNCHANGED)), ids)
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
