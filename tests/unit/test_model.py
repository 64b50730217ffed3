"""MaskFormer as assembled: shapes, gradients, determinism, precision, and a user's mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mf_scale.config.schema import (
    BackboneConfig,
    DecoderConfig,
    LossConfig,
    MatchingConfig,
    ModelConfig,
    PixelDecoderConfig,
)
from mf_scale.errors import UserError
from mf_scale.losses.criterion import Criterion, Normalisers, target_totals
from mf_scale.models.backbones import build_backbone
from mf_scale.models.build import build_model
from mf_scale.models.maskformer import MaskFormer
from tests.random_batches import CLASSES, random_batch

SMALL = ModelConfig(
    backbone=BackboneConfig("tf_efficientnet_lite0", "none"),
    pixel_decoder=PixelDecoderConfig(width=24, mask_channels=16),
    decoder=DecoderConfig(layers=3, queries=6, width=32, heads=4, feedforward=48, dropout=0.0),
)


def _with_backbone(name: str, **options) -> ModelConfig:
    return replace(SMALL, backbone=BackboneConfig(name, "none", **options))


def _images(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(64, 96), (61, 47), (32, 32), (33, 130)])
def test_any_image_size(size):
    prediction = build_model(SMALL, CLASSES, seed=0)(_images(*size))
    assert prediction.pixel_embeddings.shape == (2, 16, -(-size[0] // 4), -(-size[1] // 4))
    assert len(prediction.aux) == 2
    for layer in prediction.layers():
        assert layer.class_embeddings.shape[:2] == (2, 6) and layer.mask_embeddings.shape == (2, 6, 16)


def test_an_image_smaller_than_a_stride_is_refused():
    with pytest.raises(UserError, match="20x300 pixels is smaller than one cell"):
        build_model(SMALL, CLASSES, seed=0)(_images(20, 300))


def test_without_padding_the_image_stays_as_it_is():
    model = build_model(replace(SMALL, size_divisor=1), CLASSES, seed=0)
    assert isinstance(model, MaskFormer)
    assert model.prepare(_images(61, 47)).shape[-2:] == (61, 47)
    assert model(_images(61, 47)).pixel_embeddings.shape == (2, 16, 16, 12)


def test_padding_changes_nothing_for_a_size_that_needs_none_and_bytes_equal_floats():
    model, images = build_model(SMALL, CLASSES, seed=0).eval(), _images(64, 64)
    assert isinstance(model, MaskFormer)
    torch.testing.assert_close(model(images).class_logits, model(images.float()).class_logits)
    prepared = model.prepare(images)
    assert prepared.shape == images.shape
    torch.testing.assert_close(prepared, images / 127.5 - 1)  # this backbone's mean and std are 0.5
    assert (model.prepare(images[..., :60])[..., 60:] == 0).all()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "convnext_atto"])
@pytest.mark.parametrize("segments", [[0, 0], [3, 1]])
def test_every_parameter_gets_a_gradient_even_without_any_segment(name, segments):
    model = build_model(_with_backbone(name), CLASSES, seed=0)
    batch = random_batch(segments, (64, 64))
    criterion = Criterion(LossConfig(), MatchingConfig(), CLASSES, 6)
    terms = criterion(model(batch.images), batch, Normalisers(*target_totals(batch, 6, 0.1)))
    terms.total.backward()
    lacking = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert lacking == []
    assert (terms.terms["focal"] == 0) == (sum(segments) == 0)


def test_equal_seeds_give_equal_weights_and_leave_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, other = (build_model(SMALL, CLASSES, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["heads.class_head.weight"], other["heads.class_head.weight"])
    assert not torch.equal(first["backbone.net.conv_stem.weight"], other["backbone.net.conv_stem.weight"])


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "swin_tiny_patch4_window7_224"])
def test_bf16_autocast_trains(name):
    model, batch = build_model(_with_backbone(name), CLASSES, seed=0), random_batch([2, 3], (70, 50))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(batch.images)
        assert prediction.pixel_embeddings.dtype == torch.bfloat16
        terms = Criterion(LossConfig(), MatchingConfig(), CLASSES, 6)(prediction, batch, Normalisers(5, 7))
    assert terms.total.dtype == torch.float32
    terms.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    in_fp32 = Criterion(LossConfig(), MatchingConfig(), CLASSES, 6)(model(batch.images), batch, Normalisers(5, 7))
    assert abs(float(terms.total.detach() / in_fp32.total.detach()) - 1) < 0.05


def test_without_deep_supervision_only_the_last_layer_predicts():
    images = _images(64, 64)
    model = build_model(SMALL, CLASSES, seed=0).eval()
    bare = build_model(replace(SMALL, decoder=replace(SMALL.decoder, deep_supervision=False)), CLASSES, seed=0).eval()
    assert bare(images).aux == ()
    torch.testing.assert_close(bare(images).class_logits, model(images).class_logits)


def test_frozen_batch_norm_ignores_the_batch_and_does_not_train():
    frozen = build_model(SMALL, CLASSES, seed=0)
    moving = build_model(_with_backbone("tf_efficientnet_lite0", freeze_norm=False), CLASSES, seed=0)
    names = {n for n, _ in frozen.named_parameters()}
    assert "backbone.net.bn1.weight" not in names and "backbone.net.bn1.weight" in dict(moving.named_parameters())
    images = _images(64, 64)
    torch.testing.assert_close(frozen(images).class_logits[:1], frozen(images[:1]).class_logits, rtol=1e-4, atol=1e-4)
    before = frozen.state_dict()["backbone.net.bn1.running_mean"].clone()
    frozen(images)
    assert torch.equal(frozen.state_dict()["backbone.net.bn1.running_mean"], before)


def test_stochastic_depth_reaches_the_backbone():
    from timm.layers import DropPath

    backbone = build_backbone(BackboneConfig("convnext_atto", "none", drop_path=0.3))
    assert max(m.drop_prob for m in backbone.modules() if isinstance(m, DropPath)) == pytest.approx(0.3)


def test_parameter_counts_of_the_paper():
    """ResNet-50: 41.3 M in all. Built on the meta device: no memory, no initialisation."""
    config = ModelConfig(backbone=BackboneConfig("resnet50", "none"))
    with torch.device("meta"):
        model = build_model(config, 150, seed=0)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 41.3
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"backbone", "pixel_decoder", "transformer_decoder", "heads"}
    assert (model.num_classes, model.queries) == (150, 100)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (_with_backbone("resnt50"), "no model 'resnt50'.*resnet50"),
        (_with_backbone("levit_128"), "no features at stride 4, 8, only at"),
        (_with_backbone("vgg11", drop_path=0.1), "drop_path = 0.1, but .vgg11. has nothing"),
        (replace(SMALL, decoder=replace(SMALL.decoder, heads=5)), "width 32 must divide by the 5 attention heads"),
        (replace(SMALL, decoder=replace(SMALL.decoder, queries=0)), "decoder.queries must be at least 1"),
    ],
)
def test_a_users_mistake_is_explained(config, words):
    with pytest.raises(UserError, match=words):
        build_model(config, CLASSES, seed=0)
