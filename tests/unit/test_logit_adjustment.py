"""Logit adjustment at inference: the classes judged as if equally frequent, no-object as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.evaluation.asked import Asked
from mf_scale.evaluation.forward import answer
from mf_scale.evaluation.inference import panoptic
from mf_scale.evaluation.loading import load_checkpoint, load_model
from mf_scale.export import export_run
from mf_scale.models.build import build_model
from mf_scale.models.logit_adjustment import adjust_logits, adjusted
from mf_scale.models.outputs import Classifier, LayerPrediction, MaskPrediction, PixelPrediction
from mf_scale.rundir import VOCABULARY, RunDir
from mf_scale.vocabulary import ClassInfo, Vocabulary, log_prior
from tests.random_batches import said_outright
from tests.unit.painted import VOCABULARY_4, painted_source, write_checkpoint
from tests.unit.test_eval_asked import KNOWN, Says
from tests.unit.test_start import _config

CPU = torch.device("cpu")
IMAGES = [900, 90, 9, 1]
COUNTED = VOCABULARY_4.with_images(IMAGES)


def _prediction(biased: bool, dtype: torch.dtype = torch.float32) -> MaskPrediction:
    torch.manual_seed(0)
    embeddings = torch.randn(2, 5, 8).to(dtype)
    classifier = Classifier(torch.randn(5, 8).to(dtype), torch.randn(5).to(dtype) if biased else None)
    aux = (LayerPrediction(embeddings, torch.zeros(2, 5, 3)),)
    return MaskPrediction(embeddings, torch.zeros(2, 5, 3), torch.zeros(2, 3, 4, 4), classifier, aux)


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_classes_share_anew_what_no_object_leaves_them(tau: float, biased: bool, dtype: torch.dtype) -> None:
    prediction = _prediction(biased, dtype)
    before = prediction.class_logits.double().softmax(-1)
    found = adjusted(prediction, torch.tensor([-tau * x for x in log_prior(IMAGES)]))
    assert isinstance(found, MaskPrediction)
    after = found.class_logits.double().softmax(-1)
    share = before[..., :4] / torch.tensor(IMAGES, dtype=torch.float64) ** tau
    expected = (1 - before[..., 4:]) * share / share.sum(-1, keepdim=True)
    assert torch.allclose(after[..., 4], before[..., 4], atol=1e-6)
    assert torch.allclose(after[..., :4], expected, atol=1e-6)
    assert not torch.equal(after.argmax(-1), before.argmax(-1))


def test_of_a_per_pixel_model_the_prior_is_taken_off_the_bias() -> None:
    rows, pixels = torch.randn(1, 4, 3), torch.randn(1, 3, 2, 2)
    added = torch.tensor([-x for x in log_prior(IMAGES)])
    for bias in (None, torch.randn(4)):
        before = PixelPrediction(rows, pixels, bias)
        after = adjusted(before, added)
        assert isinstance(after, PixelPrediction)
        assert torch.allclose(after.logits(), before.logits() + added[:, None, None], atol=1e-6)


def _asked_and_adjusted(prediction: MaskPrediction, tau: float, known: Tensor = KNOWN) -> Tensor:
    """Class probabilities [.,K+1] of the two together, at the second call."""
    model = adjust_logits(Says(prediction), COUNTED, tau, where="here")
    told = Asked(model, known)
    told(torch.zeros(1))
    assert (model(torch.zeros(1)).class_logits > -torch.inf).all(), "the model itself hides nothing, before and after"
    return told(torch.zeros(1)).class_logits.double().softmax(-1)


@pytest.mark.parametrize("tau", [0.5, 1.0, 30.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_classes_have_no_share_in_what_is_divided_anew(tau: float, biased: bool, dtype: torch.dtype) -> None:
    """As `balanced` trains: hidden first, adjusted after. Classes 1 and 3 are hidden; 3 is the rarest."""
    prediction = _prediction(biased, dtype)
    before = _asked_and_adjusted(prediction, 0.0)
    after = _asked_and_adjusted(prediction, tau)
    assert torch.allclose(after[..., 4], before[..., 4], atol=1e-6)
    assert (after[..., [1, 3]] == 0).all()
    odds = before[..., 2] / before[..., 0] * (IMAGES[0] / IMAGES[2]) ** tau
    expected = (1 - before[..., 4]) * odds / (1 + odds)
    assert torch.allclose(after[..., 2], expected, atol=1e-6)
    assert torch.allclose(after[..., 0], 1 - before[..., 4] - expected, atol=1e-6)
    assert torch.equal(_asked_and_adjusted(prediction, tau, KNOWN | True), _adjusted_alone(prediction, tau))
    assert (_asked_and_adjusted(prediction, tau, KNOWN & False)[..., 4] == 1).all(), "nothing is left to divide"


def _adjusted_alone(prediction: MaskPrediction, tau: float) -> Tensor:
    model = adjust_logits(Says(prediction), COUNTED, tau, where="here")
    return model(torch.zeros(1)).class_logits.double().softmax(-1)


def test_a_rare_hidden_twin_takes_no_segments_away() -> None:
    """Five queries as sure of a class as of its rare twin, which the source does not annotate: they stay segments."""
    vocabulary = Vocabulary("twins", (ClassInfo("a", True, 0, None, 50_000), ClassInfo("b", True, 1, None, 50)))
    stripes = torch.where(torch.eye(5, dtype=torch.bool)[:, None], 9.0, -9.0)[None].transpose(1, 2)  # [1,C,5 x 1]
    prediction = said_outright(
        torch.tensor([8.0, 8.0, 2.0]).expand(1, 5, 3), torch.eye(5)[None], stripes.transpose(1, 2).reshape(1, 5, 1, 5)
    )
    for tau in (0.0, 1.0):
        told = Asked(adjust_logits(Says(prediction), vocabulary, tau, where="here"), torch.tensor([True, False]))
        found = told(torch.zeros(1))
        assert torch.allclose(found.class_logits.softmax(-1)[..., 2], torch.tensor(0.0024726), atol=1e-6)
        ((_, segments),) = panoptic(found, (1, 5), [True, True], 0.8, 0.8)
        assert [segment["label"] for segment in segments] == [0] * 5


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return painted_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(params=["mask_classification", "per_pixel"])
def run(request: pytest.FixtureRequest, tmp_path: Path, index: Index) -> str:
    config = _config(index, kind=request.param)
    config.data.val = config.data.train
    write_checkpoint(RunDir(tmp_path / "run"), config, build_model(config.model, 4, seed=0), 3, COUNTED)
    return str(tmp_path / "run")


def _logits(run: str, *said: str) -> Tensor:
    model = load_model(run, list(said), CPU).model
    with torch.no_grad():
        prediction = model(torch.arange(3 * 64 * 64).remainder(255).view(1, 3, 64, 64).float())
    return prediction.logits() if isinstance(prediction, PixelPrediction) else prediction.class_logits


def test_a_checkpoint_carries_its_counts_and_tau_0_is_to_the_bit_as_without(run: str) -> None:
    saved = json.loads(next(Path(run).rglob(VOCABULARY)).read_text())
    assert [entry["images"] for entry in saved["classes"]] == IMAGES
    plain = _logits(run)
    assert torch.equal(_logits(run, "eval.logit_adjustment=0"), plain)
    shifted = _logits(run, "eval.logit_adjustment=2")
    gained = (shifted - plain).movedim(1, -1) if plain.dim() == 4 else shifted[..., :4] - plain[..., :4]
    by_hand = -2 * torch.tensor(log_prior(IMAGES))
    assert torch.allclose(gained - gained[..., :1], by_hand - by_hand[0], atol=1e-5)


@torch.no_grad()
def test_a_model_from_its_checkpoint_hides_first_and_adjusts_after(run: str) -> None:
    image = torch.arange(3 * 64 * 64).remainder(255).view(1, 3, 64, 64).float()
    plain, told = (Asked(load_model(run, [f"eval.logit_adjustment={tau}"], CPU).model, KNOWN)(image) for tau in (0, 2))
    if isinstance(plain, PixelPrediction) and isinstance(told, PixelPrediction):
        by_hand = plain.logits() - 2 * torch.tensor(log_prior(IMAGES))[:, None, None]
        assert torch.allclose(told.logits(), by_hand, atol=1e-5)
        return
    assert isinstance(plain, MaskPrediction) and isinstance(told, MaskPrediction)
    before, after = plain.class_logits.softmax(-1), told.class_logits.softmax(-1)
    assert torch.allclose(after[..., 4], before[..., 4], atol=1e-6) and (after[..., [1, 3]] == 0).all()
    odds = before[..., 2] / before[..., 0] * (IMAGES[0] / IMAGES[2]) ** 2
    assert torch.allclose(after[..., 2] / after[..., 0], odds, rtol=1e-4)


def test_inference_answers_with_the_adjusted_logits(run: str) -> None:
    """Far beyond all logits, every pixel is of the rarest class."""
    image = np.arange(64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    for images, rarest in ((IMAGES, 3), (IMAGES[::-1], 0)):
        for file in Path(run).rglob(VOCABULARY):
            file.write_text(json.dumps(VOCABULARY_4.with_images(images).to_dict()))
        loaded = load_checkpoint(None, RunDir(Path(run)).checkpoint(3), ["eval.logit_adjustment=1e4"], CPU)
        assert (answer(loaded.model, image, loaded.config).semantic() == rarest).all()


def test_a_vocabulary_without_counts_is_refused(tmp_path: Path) -> None:
    config = _config()
    write_checkpoint(RunDir(tmp_path / "run"), config, build_model(config.model, 4, seed=0), 3)
    with pytest.raises(UserError, match=r"eval\.logit_adjustment = 1 needs the number of training images"):
        load_model(str(tmp_path / "run"), ["eval.logit_adjustment=1"], CPU)
    half = Vocabulary("half", (ClassInfo("a", True, 0, None, 5), ClassInfo("b", True, 1)))
    with pytest.raises(UserError, match="needs the number"):
        adjust_logits(torch.nn.Identity(), half, 1.0, where="here")


def test_counts_go_through_json_and_do_not_make_another_vocabulary(tmp_path: Path) -> None:
    assert COUNTED == VOCABULARY_4 and COUNTED.digest == VOCABULARY_4.digest and hash(COUNTED) == hash(VOCABULARY_4)
    assert Vocabulary.from_dict(COUNTED.to_dict()).images == IMAGES
    assert "images" not in json.dumps(VOCABULARY_4.to_dict()) and VOCABULARY_4.images is None
    for wrong in (-1, 1.5, "3", True):
        said = COUNTED.to_dict()
        said["classes"][0]["images"] = wrong
        with pytest.raises(UserError, match="is not a number of images"):
            Vocabulary.from_dict(said)


def test_an_exported_program_answers_with_the_adjusted_logits(run: str, tmp_path: Path) -> None:
    export_run(run, str(tmp_path / "out"), format="torch", size=(64, 64), overrides=["eval.logit_adjustment=1"])
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    image = torch.arange(3 * 64 * 64).remainder(255).view(1, 3, 64, 64).float()
    assert torch.allclose(program(image)[0], _logits(run, "eval.logit_adjustment=1"), atol=1e-4)
