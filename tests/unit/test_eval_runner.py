"""The runner on a tiny packed source: what is counted, what is written, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mf_scale.config.schema import Config
from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.index import Index
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.evaluation.counting import class_map, flat_map
from mf_scale.evaluation.forward import answer, inference_size
from mf_scale.evaluation.looking import choose
from mf_scale.evaluation.results import make_room, results_table, save_evaluation, write_evaluation
from mf_scale.evaluation.runner import evaluate, evaluate_run
from mf_scale.models.build import build_model
from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import read_metrics
from mf_scale.vocabulary import Vocabulary
from tests.unit.painted import (
    LAYOUTS,
    SIZES,
    VOCABULARY_4,
    ColorModel,
    painted_config,
    painted_source,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return painted_source(tmp_path_factory.mktemp("painted"))


def _evaluate(index: Index, pictures: int = 0, **options: object):
    model = ColorModel().train()
    evaluation = evaluate(
        model, index, painted_config(**options), World(), split="val", pictures=pictures, progress=False
    )
    assert model.training, "the mode is restored"
    return evaluation


def test_panoptic_counts_both_metrics(index: Index) -> None:
    results = _evaluate(index).results
    assert (results["split"], results["task"], results["samples"]) == ("val", "panoptic", 5)
    assert results["mIoU"] == results["semantic"]["mIoU"] > 0.95
    per_class = results["panoptic"]["per_class"]
    # Of image 2's two cats the first is a crowd. The prediction makes one segment of both: its IoU with the second is
    # about one half of its pixels, and crowd is half of it, so it is a match or a false positive, never two.
    assert per_class["PQ"][1] > 0.9 and per_class["PQ"][2] > 0.9 and per_class["PQ"][3] > 0.9
    assert results["PQ"] == results["panoptic"]["all"]["PQ"]
    assert results["class_names"] == VOCABULARY_4.names and results["things"] == [True, True, False, False]


def test_every_pixel_of_every_sample_is_counted_once(index: Index) -> None:
    counted = sum(_evaluate(index).results["semantic"]["per_class"]["pixels"])
    assert counted == sum(_labelled(number) for number in range(5))


def _labelled(number: int) -> int:
    """Pixels of an image whose quarter has a class."""
    height, width = SIZES[number]
    rows, columns = (height // 2, height - height // 2), (width // 2, width - width // 2)
    return sum(rows[q // 2] * columns[q % 2] for q, label in enumerate(LAYOUTS[number]) if label is not None)


def test_the_tasks_count_what_they_are_about(index: Index) -> None:
    semantic = _evaluate(index, data__task="semantic").results
    assert semantic["PQ"] is None and "panoptic" not in semantic and semantic["mIoU"] > 0.95
    instance = _evaluate(index, data__task="instance").results
    assert instance["mIoU"] is None and "semantic" not in instance
    assert instance["PQ"] == instance["panoptic"]["things"]["PQ"]
    assert instance["panoptic"]["per_class"]["PQ"][2:] == [None, None], "stuff is neither right nor wrong"


def test_mask_ap_of_the_things(index: Index) -> None:
    """Of panoptic and instance sources alike; image 2's crowd is neither found nor missed."""
    for task in ("panoptic", "instance"):
        results = _evaluate(index, data__task=task).results
        assert results["AP"] == results["instances"]["AP"] and results["instances"]["federated"] is False
        assert results["instances"]["per_class"]["instances"] == [3, 3, 0, 0]
        assert results["instances"]["per_class"]["AP"][2:] == [None, None]
        assert results["instances"]["AP50"] > 0.7 and "boundary" not in results["instances"]
        assert results["instances"]["APl"] is None, "no quarter has 96 pixels squared"
    assert "instances" not in _evaluate(index, data__task="semantic").results


def test_boundary_iou_where_it_is_asked_for(index: Index) -> None:
    results = _evaluate(index, eval__boundary=True).results
    assert 0.4 < results["semantic"]["boundary"]["mIoU"] < results["mIoU"]
    assert 0.4 < results["panoptic"]["boundary"]["all"]["PQ"] < results["PQ"]
    assert 0.4 < results["instances"]["boundary"]["AP"] <= results["AP"]


def test_confusions_are_told(index: Index) -> None:
    first = _evaluate(index).results["confusions"][0]
    assert first["truth"] != first["predicted"] and first["pixels"] > 0
    of_truth = _evaluate(index).results["semantic"]["per_class"]["pixels"][first["truth"]]
    assert first["share"] == first["pixels"] / of_truth


def test_the_first_samples_only(index: Index) -> None:
    part = evaluate(ColorModel(), index, painted_config(), World(), split="val", samples=2, progress=False)
    assert part is not None and part.results["samples"] == 2
    first = [int(index.sample(i).key) for i in range(2)]
    assert sum(part.results["semantic"]["per_class"]["pixels"]) == sum(_labelled(number) for number in first)
    more = evaluate(ColorModel(), index, painted_config(), World(), split="val", samples=99, progress=False)
    assert more is not None and more.results["samples"] == 5


def test_asked_to_stop_it_returns_nothing(index: Index) -> None:
    """Before the first image, in between, and while the instances of all images are evaluated."""
    turns = []
    for last in (0, 3, 6):
        calls = iter(range(99))
        model = ColorModel().train()
        asked = partial(_asked, calls, last)
        seen = evaluate(model, index, painted_config(), World(), split="val", progress=False, stop=asked)
        assert seen is None and model.training
        turns.append(next(calls))
    assert turns == [1, 4, 7]
    going_on = evaluate(ColorModel(), index, painted_config(), World(), split="val", progress=False, stop=lambda: False)
    assert going_on is not None


def _asked(calls: Iterator[int], last: int) -> bool:
    return next(calls) >= last


def test_best_median_and_worst_images_by_their_own_score() -> None:
    scores = np.array([0.5, np.nan, 0.9, 0.1, 0.4, 0.9, 0.7, 0.3])
    chosen = [(c.position, c.why, c.score) for c in choose(scores, 2)]
    assert chosen == [(1, "first", None), (2, "best", 0.9), (0, "median", 0.5), (3, "worst", 0.1)]
    assert [c.why for c in choose(np.full(3, np.nan), 6)] == ["first"] * 3
    many = choose(np.linspace(0, 1, 1001), 6)
    by_why = {why: [c.position for c in many if c.why == why] for why in ("first", "best", "median", "worst")}
    assert by_why == {"first": [3, 4, 5], "best": [998, 999, 1000], "median": [499, 500, 501], "worst": [0, 1, 2]}


def test_the_own_score_of_an_image_is_that_of_an_evaluation_of_it(index: Index) -> None:
    for task, number in (("semantic", "mIoU"), ("panoptic", "PQ"), ("instance", "PQ")):
        evaluation = _evaluate(index, pictures=5, data__task=task)
        assert evaluation.results["picture_score"] == number
        (first,) = (p.choice for p in evaluation.pictures if p.choice.position == 0)
        alone = evaluate(
            ColorModel(), index, painted_config(data__task=task), World(), split="val", samples=1, progress=False
        )
        assert alone is not None and first.score == pytest.approx(alone.results[number], abs=1e-9)


def test_ranks_share_the_samples(index: Index) -> None:
    """Without a process group each rank returns its own counts: together they are the whole."""
    config, model = painted_config(), ColorModel()
    parts = []
    for rank in range(3):
        evaluation = evaluate(model, index, config, World(rank, 3), split="val", pictures=2, progress=False)
        assert evaluation is not None
        parts.append(np.array(evaluation.results["semantic"]["per_class"]["pixels"]))
        assert all(p.choice.position % 3 == rank for p in evaluation.pictures)
    whole = _evaluate(index).results["semantic"]["per_class"]["pixels"]
    assert np.sum(parts, axis=0).tolist() == whole


def test_saved_results_pictures_and_event(index: Index, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.report.mkdir(parents=True)
    make_room(run, "val")
    assert not list(run.report.iterdir())
    (run.report / "classes-val.png").write_text("of the report")
    save_evaluation(run, _evaluate(index, pictures=2), step=40)
    results = json.loads((run.report / "evaluation-val.json").read_text())
    assert results["step"] == 40 and results["mIoU"] > 0.95
    titles = ["image", "ground truth", "prediction, semantic", "prediction, panoptic"]
    assert [[v["title"] for v in p["views"]] for p in results["pictures"]] == [titles] * len(results["pictures"])
    assert [p["why"] for p in results["pictures"]][-3:] == ["best", "median", "worst"]
    assert results["pictures"][-3]["score"] >= results["pictures"][-2]["score"] >= results["pictures"][-1]["score"]
    views = [v for p in results["pictures"] for v in p["views"]]
    files = {v["file"] for v in views} | {v["classes"] for v in views if v["title"] != "image"}
    assert (
        files == {f.name for f in run.report.glob("val-40-*.png")} and len(files) == 7 * len(results["pictures"]) >= 21
    )
    (event,) = read_metrics(run.metrics)
    assert (event["event"], event["step"], event["split"], event["samples"]) == ("evaluation", 40, "val", 5)
    assert event["mIoU"] == results["mIoU"] and event["PQ"] == results["PQ"]


def test_the_pictures_of_the_last_results_are_there_until_the_next_are_written(index: Index, tmp_path: Path) -> None:
    run, evaluation = RunDir(tmp_path / "run"), _evaluate(index, pictures=1)

    def write(file: Path, text: str) -> None:
        named = [json.loads(t) for t in (file.read_text() if file.exists() else text, text)]
        views = [view for results in named for picture in results["pictures"] for view in picture["views"]]
        assert all((run.report / view["file"]).is_file() for view in views)
        file.write_text(text)

    for step in (1, 2):
        make_room(run, "val")
        write_evaluation(run, evaluation, step=step, write=write)
        assert all(picture.name.startswith(f"val-{step}-") for picture in run.report.glob("*.png"))


def test_pictures_show_truth_and_prediction_alike(index: Index) -> None:
    """The model is right, so the painted truth and the painted prediction differ at borders only."""
    shown = _evaluate(index, pictures=1, data__task="semantic").pictures[0]
    views = dict(shown.views)
    differs = (np.abs(views["ground truth"].astype(int) - views["prediction"]) > 40).any(-1)
    assert differs.mean() < 0.05


def test_the_table_shows_percent(index: Index) -> None:
    results = _evaluate(index).results
    head, row = results_table([results]).splitlines()
    assert head.split()[:3] == ["split", "images", "mIoU"] and "PQ things" in head and "images/s" in head
    assert row.split()[2] == f"{100 * results['mIoU']:.2f}"
    assert len(head) == len(row)


def test_overlapping_layers_show_the_lowest() -> None:
    layers = np.array([[[0, NONE, IGNORE, NONE]], [[1, 1, NONE, NONE]]], dtype=np.int16)
    flat = flat_map(layers)
    assert flat.tolist() == [[0, 1, IGNORE, NONE]]
    assert class_map(flat, np.array([7, 9])).tolist() == [[7, 9, -1, -1]]
    assert class_map(flat[:, 2:], np.array([], dtype=np.int64)).tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (512, 683)),
        (640, 480, (683, 512)),
        (100, 1000, (100, 1000)),
        (50, 2000, (25, 1000)),
        (1, 1, (512, 512)),
    ],
)
def test_inference_size_keeps_the_aspect_within_both_limits(height: int, width: int, expected: tuple[int, int]) -> None:
    assert inference_size(height, width, 512, 1000) == expected


@pytest.mark.parametrize(
    ("short_side", "stride", "off"), [(243, 4, 1), (25, 4, 2), (243, 8, 1), (243, 14, 2), (61, 1, 1)]
)
@pytest.mark.parametrize("size", [(61, 83), (64, 96), (37, 50)])
def test_an_answer_lies_on_its_image(size: tuple[int, int], short_side: int, stride: int, off: int) -> None:
    """A vertical edge is found where it is, also where the inference size is no multiple of the stride."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    edge = size[1] * 3 // 4
    image[:, :edge], image[:, edge:] = (230, 40, 40), (50, 80, 240)
    config = painted_config(eval__short_side=short_side, eval__max_side=1000)
    classes = answer(ColorModel(stride).eval(), image, config).semantic()
    assert classes.shape == size
    found = (classes == 0).sum(1)
    assert abs(found - edge).max() <= off


def _real_run(tmp_path: Path, index: Index | None, vocabulary: Vocabulary = VOCABULARY_4) -> tuple[RunDir, Config]:
    """A run directory with a checkpoint of a small real MaskFormer with random weights."""
    config = painted_config(eval__short_side=64)
    config.data.val = index.source if index else None
    config.model.backbone = replace(config.model.backbone, name="resnet18", weights="none")
    config.model.pixel_decoder = replace(config.model.pixel_decoder, width=16, mask_channels=16)
    config.model.decoder = replace(config.model.decoder, layers=1, queries=5, width=16, heads=2, feedforward=16)
    run = RunDir(tmp_path / "run")
    write_checkpoint(run, config, build_model(config.model, 4, seed=0), 7, vocabulary)
    return run, config


def test_a_real_model_from_its_run_directory(index: Index, tmp_path: Path) -> None:
    run, _ = _real_run(tmp_path, index)
    table = evaluate_run(str(run.path), ["eval.object_threshold=0.1"], World(), split="val")
    assert "mIoU" in table
    results = json.loads((run.report / "evaluation-val.json").read_text())
    assert results["step"] == 7 and 0 <= results["mIoU"] <= 1 and len(results["pictures"]) == 5


def test_no_source_is_a_users_mistake(tmp_path: Path) -> None:
    run, _ = _real_run(tmp_path, None)
    with pytest.raises(UserError, match=r"data\.val=FOLDER"):
        evaluate_run(str(run.path), [], World(), split="val")


def test_another_vocabulary_is_refused(index: Index, tmp_path: Path) -> None:
    tiger = replace(VOCABULARY_4, classes=(replace(VOCABULARY_4.classes[0], name="tiger"), *VOCABULARY_4.classes[1:]))
    run, _ = _real_run(tmp_path, index, tiger)
    with pytest.raises(UserError, match="vocabulary"):
        evaluate_run(str(run.path), [], World(), split="val")
