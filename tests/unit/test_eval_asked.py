"""A model that is asked only for the classes of a source; a source counted and reported by the classes of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data_tools.__main__ import main
from mf_scale.commands.report import source_counts
from mf_scale.config.load import config_to_yaml
from mf_scale.config.schema import Config, SourceConfig
from mf_scale.data.sources import open_training
from mf_scale.evaluation.asked import Asked, asked
from mf_scale.evaluation.averaging import averaged_semantic
from mf_scale.evaluation.inference import instance, semantic
from mf_scale.evaluation.per_pixel import per_pixel_semantic
from mf_scale.evaluation.views import View
from mf_scale.models.outputs import Classifier, MaskPrediction, PixelPrediction
from tests.random_batches import said_outright
from tests.sources import make_source, small_config

KNOWN = torch.tensor([True, False, True, False])


class Says(nn.Module):
    """Says the same of every image."""

    stride = 4

    def __init__(self, prediction: MaskPrediction | PixelPrediction) -> None:
        super().__init__()
        self.prediction = prediction
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> MaskPrediction | PixelPrediction:
        return self.prediction


def test_hidden_classes_have_no_probability_and_the_others_share_it():
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for bias in (None, torch.tensor([0.0, 5.0, 0.0, 0.0, 0.0])):
        classifier = Classifier(drawn(5, 3), bias)
        given = MaskPrediction(drawn(1, 6, 3), drawn(1, 6, 2), drawn(1, 2, 4, 4), classifier)
        told = Asked(Says(given), KNOWN)(torch.zeros(1))
        share = told.class_logits.softmax(-1)
        wanted = given.class_logits[..., [0, 2, 4]].softmax(-1)
        assert (share[..., [1, 3]] == 0).all() and torch.allclose(share[..., [0, 2, 4]], wanted)
        assert set(semantic(told, (8, 8)).unique().tolist()) <= {0, 2}
        assert bias is None or 1 in semantic(given, (8, 8)), "it would be said"
    for bias in (None, torch.tensor([0.0, 5.0, 0.0, 0.0])):
        pixels = PixelPrediction(drawn(1, 4, 2), drawn(1, 2, 4, 4), bias)
        told = Asked(Says(pixels), KNOWN)(torch.zeros(1))
        assert set(per_pixel_semantic(told, (8, 8)).unique().tolist()) <= {0, 2}
        assert bias is None or 1 in per_pixel_semantic(pixels, (8, 8))


def _all_ways(told: MaskPrediction | PixelPrediction) -> list[torch.Tensor]:
    """Class of the pixels of an image as large as the grid: the plain way and by averaging, in one piece and many."""
    size = (told.pixel_embeddings.shape[-2], told.pixel_embeddings.shape[-1])
    view = View(told, (float(size[0]), float(size[1])), None, False)
    found = [averaged_semantic([[view]], size, budget=budget) for budget in (1, 1 << 20)]
    for budget in (1, 1 << 20):
        if isinstance(told, MaskPrediction):
            found.append(semantic(told, size, budget=budget)[0])
        else:
            found.append(per_pixel_semantic(told, size, budget=budget)[0])
    return found


def test_where_nothing_is_said_a_class_that_is_asked_for_wins() -> None:
    """Class 0 and 1 are hidden. No query has a mask at pixel 0; then no-object takes all of every query; then NaN."""
    known, rows = torch.tensor([False, False, True, True]), torch.tensor([[[9.0, 0, 0, 1, 0], [9.0, 0, 0, 1, 0]]])
    masks = torch.tensor([[[[-torch.inf, 3.0]], [[-torch.inf, -3.0]]]]).nan_to_num(neginf=-1e9)
    given = said_outright(rows, torch.eye(2)[None], masks)
    ways = _all_ways(Asked(Says(given), known)(torch.zeros(1)))
    assert [way.tolist() for way in ways] == [[[2, 3]]] * 4
    given = said_outright(torch.tensor([[[0.0, 0, 0, 0, 900]] * 2]), torch.eye(2)[None], masks)
    assert all((way == 2).all() for way in _all_ways(Asked(Says(given), known)(torch.zeros(1))))
    nan = torch.full((1, 1, 1, 2), torch.nan)
    for of_nan in (said_outright(rows[:, :1], torch.ones(1, 1, 1), nan), PixelPrediction(torch.ones(1, 4, 1), nan)):
        assert all((way == 2).all() for way in _all_ways(Asked(Says(of_nan), known)(torch.zeros(1))))


def test_hidden_classes_are_no_instances() -> None:
    given = said_outright(torch.zeros(1, 3, 5), torch.ones(1, 3, 1), torch.full((1, 1, 4, 4), 3.0))
    (found,) = instance(given, (4, 4), [True] * 4, 100, 0.0)
    assert len(found) == 12
    (found,) = instance(Asked(Says(given), KNOWN)(torch.zeros(1)), (4, 4), [True] * 4, 100, 0.0)
    assert sorted(found.labels.tolist()) == [0, 0, 0, 2, 2, 2] and (found.scores > 0.3).all()


def test_counts_of_stats_and_report_are_of_the_classes_of_the_run(tmp_path: Path, capsys):
    make_source(tmp_path / "s", [8])
    fold = {"class0": "pair", "class1": "pair", "class5": None}
    sources = [SourceConfig(str(tmp_path / "s"), map=fold)]
    (index,) = open_training(small_config(sources=sources))
    model = Says(PixelPrediction(torch.zeros(1, 4, 2), torch.zeros(1, 2, 4, 4)))
    assert asked(model, index) is model, "the source annotates all of them"
    (tmp_path / "vocabulary.json").write_text(json.dumps(index.vocabulary.to_dict()))
    (tmp_path / "config.yaml").write_text(config_to_yaml(Config(data=small_config(sources=sources))))
    (counts,) = source_counts(tmp_path / "config.yaml")
    assert counts.class_names == ["pair", "class2", "class3", "class4"]
    assert counts.class_images == index.class_counts().tolist() and counts.vocabulary == "test"
    stats = ["stats", str(tmp_path / "s"), "--workers", "1", "--json"]
    assert main([*stats, str(tmp_path / "plain.json")]) in (0, None)
    assert main([*stats, str(tmp_path / "of.json"), "--vocabulary", str(tmp_path / "vocabulary.json")]) in (0, None)
    plain, of_run = (
        {row["name"]: row for row in json.loads((tmp_path / name).read_text())["classes"]}
        for name in ("plain.json", "of.json")
    )
    assert [row["images"] for row in of_run.values()] == index.class_counts().tolist()
    for what in ("segments", "pixels", "crowd"):
        assert of_run["pair"][what] == plain["class0"][what] + plain["class1"][what]
        assert of_run["class4"][what] == plain["class4"][what]
    assert np.all([row["images"] <= 8 for row in of_run.values()])
