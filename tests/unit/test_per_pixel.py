"""The per-pixel baselines: what they are made of, how they are evaluated, what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mf_scale.config.load import load_config
from mf_scale.config.schema import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from mf_scale.config.validate import validate
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.evaluation import loading
from mf_scale.evaluation.loading import load_model
from mf_scale.evaluation.per_pixel import per_pixel_semantic
from mf_scale.evaluation.prediction.parts import predict_images
from mf_scale.evaluation.prediction.words import Options
from mf_scale.evaluation.runner import evaluate_run
from mf_scale.losses.pixel_criterion import PixelCriterion
from mf_scale.models.build import build_model
from mf_scale.rundir import RunDir
from mf_scale.training.initial import initial_model
from tests.random_batches import random_batch, random_pixel_prediction
from tests.unit.painted import VOCABULARY_4, painted_config, painted_source, write_checkpoint

CLASSES = 9
SMALL = ModelConfig(
    backbone=BackboneConfig(name="resnet18", weights="none"),
    pixel_decoder=PixelDecoderConfig(width=16, mask_channels=12),
    decoder=DecoderConfig(layers=3, queries=4, width=16, heads=2, feedforward=32),
)
KINDS = ["per_pixel", "per_pixel_plus"]


def _build(kind: str, **changes: Any) -> Any:
    return build_model(replace(SMALL, kind=kind, **changes), CLASSES, seed=0)


def test_the_baseline_is_fpn_and_a_classifier() -> None:
    model = _build("per_pixel").eval()
    prediction = model(torch.zeros(2, 3, 70, 100, dtype=torch.uint8))
    assert prediction.logits().shape == (2, CLASSES, 18, 25) and prediction.aux == ()
    own = {n for n, _ in model.named_parameters() if not n.startswith(("backbone.", "pixel_decoder."))}
    assert own == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.shape == (CLASSES, 12) and (model.classifier.bias == 0).all()


def test_plus_has_a_query_a_class_in_every_layer_and_no_class_head() -> None:
    model = _build("per_pixel_plus").eval()
    prediction = model(torch.zeros(2, 3, 70, 100, dtype=torch.uint8))
    assert prediction.logits().shape == (2, CLASSES, 18, 25)
    assert prediction.stacked().shape == (2, 3, CLASSES, 12) and prediction.bias is None
    assert model.transformer_decoder.queries.weight.shape == (CLASSES, 16)
    assert not [name for name in model.state_dict() if "class" in name]
    alone = _build("per_pixel_plus", decoder=replace(SMALL.decoder, deep_supervision=False))
    assert alone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).aux == ()


def test_plus_is_maskformers_masks() -> None:
    """With the same weights its class logits are the mask logits of a MaskFormer with K queries."""
    plus = _build("per_pixel_plus").eval()
    queries = replace(SMALL.decoder, queries=CLASSES)
    maskformer = build_model(replace(SMALL, decoder=queries), CLASSES, seed=1).eval()
    state = {name.replace("mask_head", "heads.mask_head"): t for name, t in plus.state_dict().items()}
    left = maskformer.load_state_dict(state, strict=False)
    assert left.missing_keys == ["heads.class_head.weight", "heads.class_head.bias"] and not left.unexpected_keys
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    wanted = maskformer(images)
    for mine, theirs in zip(plus(images).stacked().unbind(1), wanted.layers(), strict=True):
        torch.testing.assert_close(mine, theirs.mask_embeddings)
    torch.testing.assert_close(plus(images).pixel_embeddings, wanted.pixel_embeddings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_also_without_a_labelled_pixel(kind: str) -> None:
    model, batch = _build(kind), random_batch([0, 0], (64, 64))
    criterion = PixelCriterion()
    loss = criterion(model(batch.images), batch, criterion.normalisers(criterion.totals(batch)))
    loss.total.backward()
    assert loss.total == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("budget", [1, 500, 2**24])
def test_semantic_inference_is_the_argmax_of_upsampled_logits(bias: bool, budget: int) -> None:
    prediction = random_pixel_prediction(2, layers=2, bias=bias, dtype=torch.float32)
    wanted = F.interpolate(prediction.logits(), size=(31, 45), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(per_pixel_semantic(prediction, (31, 45), budget=budget), wanted)


def test_semantic_inference_reads_the_part_that_holds_the_image() -> None:
    prediction = random_pixel_prediction(1, size=(6, 8), dtype=torch.float32)
    whole = per_pixel_semantic(prediction, (24, 32))
    assert torch.equal(per_pixel_semantic(prediction, (12, 20), extent=(3.0, 5.0)), whole[:, :12, :20])


def test_semantic_inference_never_holds_all_classes() -> None:
    made: list[int] = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            out = function(*arguments, **(named or {}))
            made.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    prediction = random_pixel_prediction(1, layers=1, classes=2000, size=(8, 8), dtype=torch.float32)
    with Largest():
        per_pixel_semantic(prediction, (64, 64), budget=2**16)
    assert max(made) <= 2**16


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.kind=per_pixel"], "model.kind = per_pixel gives every pixel a class.*needs data.task = semantic"),
        (["model.kind=per_pixel_plus", "data.task=instance"], "needs data.task = semantic"),
        (["model.pixel_level.features=head"], "model.pixel_level.features = head does nothing without"),
        (["model.pixel_level.kwargs.width=3"], "model.pixel_level.kwargs = .*width.* does nothing without"),
        (
            [
                "model.pixel_level.builder=a:b",
                "model.pixel_level.memory=c",
                "model.kind=per_pixel",
                "data.task=semantic",
            ],
            "memory = c does nothing with model.kind = per_pixel",
        ),
        (["model.pixel_level.builder=a:b", "model.backbone.name=resnet18"], "model.backbone.name = resnet18 does noth"),
        (["model.pixel_level.builder=a:b", "model.backbone.weights=none"], "model.backbone.weights = none does noth"),
        (["model.pixel_level.builder=a:b", "model.pixel_decoder.encoder_layers=6"], "encoder_layers = 6 does nothing"),
        (["model.pixel_level.builder=a:b", "model.pixel_level.std=[1,0,1]"], "three numbers each, std above 0"),
        (["model.pixel_level.builder=a:b", "model.pixel_level.mean=[0.5]"], "three numbers each"),
    ],
)
def test_settings_that_do_nothing_or_cannot_be_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(load_config(None, overrides))


def test_sound_settings_are_taken() -> None:
    validate(load_config(None, ["model.kind=per_pixel", "data.task=semantic"]))
    validate(load_config(None, ["model.pixel_level.builder=a:b", "model.backbone.freeze_norm=false"]))


def _run(folder: Path, model: ModelConfig, source: str | None = None) -> RunDir:
    config = painted_config(eval__short_side=64, data__task="semantic")
    config.model, config.data.val = model, source
    run = RunDir(folder / "run")
    write_checkpoint(run, config, build_model(config.model, 4, seed=0), 7)
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_evaluated_and_predicts_classes(kind: str, tmp_path: Path) -> None:
    source = painted_source(tmp_path / "painted").source
    run = _run(tmp_path, replace(SMALL, kind=kind), source)
    assert "mIoU" in evaluate_run(str(run.path), [], World(), split="val")
    results = json.loads((run.report / "evaluation-val.json").read_text())
    assert 0 <= results["mIoU"] <= 1 and results["PQ"] is None
    with pytest.raises(UserError, match=r"needs data\.task = semantic"):
        evaluate_run(str(run.path), ["data.task=panoptic"], World(), split="val")

    image = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(image)
    assert predict_images([str(image)], str(run.path), str(tmp_path / "out"), Options("semantic")) == 0
    for task in ("panoptic", "instance"):
        with pytest.raises(UserError, match=r"knows no segments.*--task semantic"):
            predict_images([str(image)], str(run.path), str(tmp_path / task), Options(task))


def _own_model(**settings: Any) -> ModelConfig:
    config = ModelConfig(decoder=SMALL.decoder, pixel_decoder=PixelDecoderConfig(mask_channels=12))
    config.pixel_level = replace(config.pixel_level, builder="tests.segmentation_models:own", **settings)
    return config


def test_a_checkpoint_cannot_have_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path, _own_model(kwargs={"width": 8}))

    def build(*_: object, **__: object) -> None:
        raise AssertionError("the builder would have been run")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "build_model", build)
        for overrides in ([], ["eval.short_side=96"], ["model.pixel_level.kwargs.width=8"]):
            with pytest.raises(UserError) as caught:
                load_model(str(run.path), overrides, torch.device("cpu"))
            assert "would import and call tests.segmentation_models:own(width=8)" in str(caught.value)
            assert "model.pixel_level.builder=tests.segmentation_models:own" in caught.value.remedy
    asked = ["model.pixel_level.builder=tests.segmentation_models:own"]
    loaded = load_model(str(run.path), asked, torch.device("cpu"))
    assert loaded.model.stride == 8
    assert load_model(
        str(run.path), ["model={pixel_level: {builder: 'tests.segmentation_models:own'}}"], torch.device("cpu")
    )


def test_every_command_that_reads_a_checkpoint_asks(tmp_path: Path) -> None:
    run = _run(tmp_path, _own_model(), painted_source(tmp_path / "painted").source)
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(image)
    with pytest.raises(UserError, match="If you trust that call"):
        predict_images([str(image)], str(run.path), str(tmp_path / "out"), Options("semantic"))
    with pytest.raises(UserError, match="If you trust that call"):
        evaluate_run(str(run.path), [], World(), split="val")
    assert "mIoU" in evaluate_run(
        str(run.path), ["model.pixel_level.builder=tests.segmentation_models:own"], World(), split="val"
    )


def test_init_from_takes_weights_and_runs_only_the_users_own_builder(tmp_path: Path) -> None:
    foreign = painted_config(data__task="semantic")
    foreign.model = _own_model()
    run = RunDir(tmp_path / "run")
    weights = build_model(foreign.model, 4, seed=5)
    foreign.model.pixel_level = replace(foreign.model.pixel_level, builder="tests.segmentation_models:failing")
    write_checkpoint(run, foreign, weights, 7)
    config = painted_config(train__init_from=str(run.path))
    config.model = _own_model()
    model, _ = initial_model(config, VOCABULARY_4, None)
    assert all(map(torch.equal, model.state_dict().values(), weights.state_dict().values()))
