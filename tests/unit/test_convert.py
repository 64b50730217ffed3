"""Any per-pixel model becomes the pixel level of a MaskFormer, with its weights; what does not fit is explained."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mf_scale.config.schema import (
    BackboneConfig,
    Config,
    DecoderConfig,
    LossConfig,
    MatchingConfig,
    ModelConfig,
    OptimizerConfig,
    PixelDecoderConfig,
    PixelLevelConfig,
)
from mf_scale.errors import UserError
from mf_scale.losses.choose import choose_criterion
from mf_scale.losses.criterion import Criterion
from mf_scale.models.build import build_model
from mf_scale.models.convert import to_mask_classification
from mf_scale.training.optimizer import parameter_groups
from tests.random_batches import random_batch
from tests.segmentation_models import Labels, Own, Padded, Tokens, TwoHeads

CLASSES = 7
SMALL = ModelConfig(
    backbone=BackboneConfig(freeze_norm=False),
    pixel_decoder=PixelDecoderConfig(mask_channels=8),
    decoder=DecoderConfig(layers=2, queries=6, width=16, heads=2, feedforward=32),
)


def converted_from(*arguments: Any, **settings: Any) -> Any:
    return to_mask_classification(*arguments, **settings)


def build(*arguments: Any, **settings: Any) -> Any:
    return build_model(*arguments, **settings)


def _with_builder(name: str = "own", kind: str = "mask_classification", **settings) -> ModelConfig:
    level = PixelLevelConfig(builder=f"tests.segmentation_models:{name}", **settings)
    return replace(SMALL, kind=kind, pixel_level=level)


def _shared(model: nn.Module, converted: nn.Module) -> set[str]:
    """Parameters of the model that are the very same tensors in the converted one."""
    inside = {id(p) for p in converted.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside}


def test_the_classifier_is_found_and_the_weights_are_kept():
    model: Any = Own()
    before = copy.deepcopy(model.state_dict())
    converted = converted_from(model, CLASSES, config=SMALL)
    assert "the input of head [16 channels, stride 8]" in converted.backbone.notes[0]
    assert converted.stride == 8
    classifier = {"head.weight", "head.bias"}
    assert _shared(model, converted) == set(dict(model.named_parameters())) - classifier
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    images = torch.randn(1, 3, 64, 96)
    model.eval(), converted.eval()
    assert torch.equal(converted.backbone(images)[0], model.features(images))
    assert set(model(images)) == {"out", "aux"}  # the given model is still whole


@pytest.mark.parametrize("size", [(64, 96), (97, 130), (33, 71)])
def test_any_size_of_image(size):
    converted = converted_from(Own(), CLASSES, config=SMALL).eval()
    prediction = converted(torch.zeros(2, 3, *size, dtype=torch.uint8))
    assert prediction.pixel_embeddings.shape == (2, 8, -(-size[0] // 8), -(-size[1] // 8))
    assert prediction.class_logits.shape == (2, 6, CLASSES + 1) and len(prediction.aux) == 1


def test_what_lies_behind_the_classifier_is_not_run():
    model, ran = Own(), []
    model.auxiliary.register_forward_hook(lambda *_: ran.append("auxiliary"))
    converted = converted_from(model, CLASSES, features="head", config=SMALL)
    ran.clear()
    converted(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert not ran


def test_every_parameter_that_wants_a_gradient_gets_one():
    converted = converted_from(Own(), CLASSES, config=SMALL)
    frozen = {name for name, p in converted.named_parameters() if not p.requires_grad}
    assert frozen == {f"backbone.net.{name}" for name in ("spare", "auxiliary.weight", "auxiliary.bias")}
    assert "spare, auxiliary.weight, auxiliary.bias" in converted.backbone.notes[1]
    batch = random_batch([2, 3], (64, 96))
    criterion = Criterion(LossConfig(), MatchingConfig(), CLASSES, 6)
    criterion(converted(batch.images), batch, criterion.normalisers(criterion.totals(batch))).total.backward()
    assert all(p.grad is not None for p in converted.parameters() if p.requires_grad)


def test_memory_is_a_named_layer_or_the_averaged_features():
    images = torch.randn(2, 3, 64, 96)
    plain = converted_from(Own(), CLASSES, config=SMALL).eval()
    features = plain.backbone(images)
    _, memory = plain.pixel_decoder(features)
    assert memory.shape == (2, 16, 2, 3)
    torch.testing.assert_close(memory[..., 0, 0], features[0][..., :4, :4].mean((2, 3)))

    model: Any = Own().eval()
    named = converted_from(model, CLASSES, memory="stem", config=SMALL).eval()
    features = named.backbone(images)
    assert torch.equal(features[1], model.stem(images)) and named.pixel_decoder(features)[1] is features[1]
    assert named.backbone.channels == [16, 16] and not named.backbone.ear.heard
    twin = copy.deepcopy(named)
    assert torch.equal(twin.backbone(images)[1], features[1]) and not named.backbone.ear.heard
    assert not model.stem._forward_hooks


def test_a_linear_classifier_on_channels_last_features():
    config = replace(SMALL, size_divisor=14)
    converted = converted_from(Tokens(), CLASSES, config=config).eval()
    assert converted.stride == 14 and converted.backbone.channels == [12]
    assert converted(torch.zeros(1, 3, 65, 40, dtype=torch.uint8)).pixel_embeddings.shape == (1, 8, 5, 3)


def test_the_random_state_is_left_alone():
    def state_after(features: str | None) -> torch.Tensor:
        torch.manual_seed(3)
        model = Own()
        converted_from(model, CLASSES, features=features, config=SMALL)
        return torch.get_rng_state()

    # Finding the classifier is one more run, in which dropout would draw.
    assert torch.equal(state_after(None), state_after("head"))
    model: Any = Own().train()
    converted_from(model, CLASSES, config=SMALL)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.stem[1].running_mean, torch.zeros(16))


def test_frozen_norms_keep_their_values():
    model: Any = Own()
    model.stem[1].weight.data.fill_(3.0)
    converted = converted_from(model, CLASSES, config=replace(SMALL, backbone=BackboneConfig()))
    assert not [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (converted.state_dict()["backbone.net.stem.1.weight"] == 3).all()
    assert "backbone.net.stem.1.weight" not in dict(converted.named_parameters())


def test_parameter_groups_tell_the_models_part_from_the_new_one():
    converted = converted_from(Own(), CLASSES, config=SMALL)
    rate: dict[int, float] = {}
    for group in parameter_groups(converted, OptimizerConfig(lr=1.0, backbone_multiplier=0.1)):
        rate |= {id(p): group["lr"] for p in group["params"]}
    for name, parameter in converted.named_parameters():
        if parameter.requires_grad:
            assert rate[id(parameter)] == (0.1 if name.startswith("backbone.net.") else 1.0)
    assert {"pixel_decoder.project.weight", "heads.class_head.weight"} <= dict(converted.named_parameters()).keys()


@pytest.mark.parametrize("kind", ["mask_classification", "per_pixel", "per_pixel_plus"])
def test_the_configuration_reaches_it_for_every_kind(kind):
    config = _with_builder(kind=kind, kwargs={"width": 8})
    state = torch.get_rng_state()
    first, second = (build(config, CLASSES, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    batch = random_batch([2, 3], (64, 64))
    criterion = choose_criterion(Config(model=config), CLASSES)
    criterion(first(batch.images), batch, criterion.normalisers(criterion.totals(batch))).total.backward()
    assert all(p.grad is not None for p in first.parameters() if p.requires_grad)


def test_a_per_pixel_model_stays_one_with_a_new_classifier_on_its_features():
    model = build(_with_builder(kind="per_pixel"), CLASSES, seed=0).eval()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    features = model.backbone(model.prepare(images))[0]
    wanted = nn.functional.conv2d(features, model.classifier.weight[..., None, None], model.classifier.bias)
    torch.testing.assert_close(model(images).logits(), wanted)
    assert set(dict(model.named_parameters())) - {f"backbone.net.{n}" for n, _ in Own().named_parameters()} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_the_models_own_statistics_are_used():
    model = build(_with_builder(mean=[0.5, 0.5, 0.5], std=[0.5, 0.25, 0.5]), CLASSES, seed=0)
    white = model.prepare(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    assert white[0, :, 0, 0].tolist() == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (TwoHeads, {}, r"2 layers together make the 5 channels.*left \(Conv2d \[2, 8, 32, 48\] -> \[2, 5, 32, 48\]\)"),
        (Labels, {}, r"no differentiable map \[B,K,h,w\] but a tensor \[2, 32, 48\].*head \(Conv2d"),
        (Own, {"features": "haed"}, "no layer 'haed'.*Nearest paths: head"),
        (Own, {"memory": "stm"}, "no layer 'stm'.*Nearest paths: stem"),
        (Own, {"memory": "auxiliary"}, "the output of auxiliary is not made before the classifier runs"),
        (Padded, {}, "no whole stride.*size_divisor"),
        (nn.Identity, {}, "no differentiable map.*It ran no convolution"),
        (lambda: nn.Conv2d(4, 5, 1), {}, "failed in a trial run with images .*RuntimeError"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 192, 5)), {"features": "1"}, r"no map \[B,c,h,w\]"),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.Softmax(1)), {"features": "1.0"}, "no layer '1.0'"),
    ],
)
def test_a_model_that_does_not_fit_is_explained(model, settings, words):
    with pytest.raises(UserError, match=words):
        converted_from(model(), CLASSES, config=SMALL, **settings)


def test_a_layer_that_is_not_run_is_no_classifier():
    model = Own()
    model.unused = nn.Conv2d(16, 5, 1)
    with pytest.raises(UserError, match="ends without running the layer"):
        converted_from(model, CLASSES, features="unused", config=SMALL)


@pytest.mark.parametrize(
    ("builder", "kwargs", "words"),
    [
        ("tests.segmentation_models", {}, "is not package.module:function"),
        ("no_such_package.models:build", {}, "no_such_package.models cannot be imported.*PYTHONPATH"),
        ("tests.segmentation_models:owm", {}, "no function 'owm'.*Nearest names: own"),
        ("tests.segmentation_models:not_a_function", {}, "is a int, not a function"),
        ("tests.segmentation_models:failing", {"reason": "x y"}, r"failing\(reason='x y'\) failed: ValueError x y"),
        ("tests.segmentation_models:own", {"widht": 3}, "unexpected keyword argument 'widht'"),
        ("tests.segmentation_models:number", {}, "returned a int, not a torch.nn.Module"),
    ],
)
def test_a_builder_that_does_not_work_is_explained(builder, kwargs, words):
    config = replace(SMALL, pixel_level=PixelLevelConfig(builder=builder, kwargs=kwargs))
    with pytest.raises(UserError, match=words):
        build(config, CLASSES, seed=0)


def test_a_model_without_gradients_is_frozen_as_a_whole():
    model = Own()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    converted = converted_from(model, CLASSES, config=SMALL)
    assert not [p for p in converted.backbone.parameters() if p.requires_grad]
    assert converted(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).class_logits.requires_grad


@pytest.mark.parametrize(
    ("name", "features", "stride", "channels"),
    [
        ("fcn_resnet50", "classifier.4", 8, 512),
        ("deeplabv3_mobilenet_v3_large", "classifier.4", 16, 256),
    ],
)
def test_torchvisions_models_are_understood(name, features, stride, channels):
    from torchvision.models import segmentation

    model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    converted = converted_from(model, CLASSES, config=SMALL)
    assert f"the input of {features} [{channels} channels, stride {stride}]" in converted.backbone.notes[0]
    assert "aux_classifier.4.weight" in converted.backbone.notes[1]
    left = {n for n, _ in model.named_parameters()} - _shared(model, converted)
    assert left == {f"{features}.weight", f"{features}.bias"}


def test_lraspp_has_two_classifiers_and_takes_a_name():
    from torchvision.models import segmentation

    model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(UserError, match=r"classifier\.high_classifier.*classifier\.low_classifier"):
        converted_from(model, CLASSES, config=SMALL)
    converted = converted_from(model, CLASSES, features="classifier.high_classifier", config=SMALL)
    assert converted.stride == 8
    assert "classifier.low_classifier.weight" in converted.backbone.notes[1]


def test_a_segformer_of_transformers_is_understood():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 4]}
    model = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=9)
    ).eval()
    converted = converted_from(model, CLASSES, config=SMALL).eval()
    assert "the input of decode_head.classifier [16 channels, stride 4]" in converted.backbone.notes[0]
    images = torch.randn(1, 3, 64, 96)
    features = converted.backbone(images)[0]
    torch.testing.assert_close(model.decode_head.classifier(features), model(images).logits)
    left = {n for n, _ in model.named_parameters()} - _shared(model, converted)
    assert left == {"decode_head.classifier.weight", "decode_head.classifier.bias"}


@pytest.mark.parametrize("memory", [None, "stem"])
def test_it_can_be_exported_and_compiled(memory):

    class ClassLogits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images).class_logits

    converted: Any = ClassLogits(converted_from(Own(), CLASSES, memory=memory, config=SMALL)).eval()
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    wanted = converted(images)
    exported = torch.export.export(converted, (images,))
    torch.testing.assert_close(exported.module()(images), wanted)
    exported.graph.eliminate_dead_code()
    assert not [node for node in exported.graph.nodes if "upsample" in str(node.target)]
    assert not converted.model.backbone.cut.reached and not converted.model.backbone.ear.heard
    torch.testing.assert_close(torch.compile(converted, backend="aot_eager", fullgraph=True)(images), wanted)
