"""Backbones behind one interface: strides, any size, rates that act, recomputed stages, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from mf_scale.config.schema import BackboneConfig, Config
from mf_scale.config.validate import validate
from mf_scale.errors import UserError
from mf_scale.models.backbones import STRIDES, build_backbone

FAMILY = [
    "resnet10t",
    "convnext_atto",
    "tf_efficientnet_lite0",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "swinv2_tiny_window8_256",
]


@pytest.mark.parametrize("name", FAMILY)
def test_four_strides_rounded_up_at_any_size(name):
    backbone = build_backbone(BackboneConfig(name, "none")).eval()
    with torch.no_grad():
        for height, width in ((64, 96), (70, 50), (33, 1)):
            features = backbone(torch.randn(2, 3, height, width))
            wanted = [(2, c, -(-height // s), -(-width // s)) for c, s in zip(backbone.channels, STRIDES, strict=True)]
            assert [tuple(f.shape) for f in features] == wanted and all(f.isfinite().all() for f in features)
    assert len(backbone.mean) == len(backbone.std) == 3 and backbone.stride == 4


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet50", 23.5),
        ("resnet101", 42.5),
        ("resnet101s", 42.6),
        ("swin_tiny_patch4_window7_224", 27.5),
        ("swin_small_patch4_window7_224", 48.8),
        ("swin_base_patch4_window12_384.ms_in22k", 86.9),
        ("swin_large_patch4_window12_384", 195.2),
    ],
)
def test_parameter_counts_of_the_zoo(name, millions):
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name, "none"))
    own = sum(p.numel() for p in backbone.parameters())
    frozen = sum(b.numel() for n, b in backbone.named_buffers() if n.endswith((".weight", ".bias")))
    assert (own + frozen) / 1e6 == pytest.approx(millions, abs=0.051)


def test_r101c_has_the_stem_of_deeplab():
    with torch.device("meta"):
        net: Any = build_backbone(BackboneConfig("resnet101s", "none")).net
    stem = [module for module in net.conv1 if isinstance(module, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size, c.stride) for c in stem] == [
        (64, (3, 3), (2, 2)),
        (64, (3, 3), (1, 1)),
        (128, (3, 3), (1, 1)),
    ]


def test_multi_grid_dilates_the_last_stage_alone_and_keeps_strides_and_parameters():
    plain, dilated = (
        build_backbone(BackboneConfig("resnet26", "none", multi_grid=grid)).eval() for grid in ([], [2, 4])
    )
    opened = {n: t + 1 if n.endswith("bn3.weight") else t for n, t in plain.state_dict().items()}  # timm starts at 0
    for backbone in (plain, dilated):
        backbone.load_state_dict(opened)
    images = torch.randn(1, 3, 160, 96)
    with torch.no_grad():
        features, wanted = dilated(images), plain(images)
    assert [f.shape for f in features] == [f.shape for f in wanted]
    assert all(torch.equal(a, b) for a, b in zip(features[:3], wanted[:3], strict=True))
    assert not torch.allclose(features[3], wanted[3])
    net: Any = dilated.net
    assert [block.conv2.dilation for block in net.layer4] == [(2, 2), (4, 4)]
    for name, grid, words in (
        ("resnet26", [1, 2, 4], "has 2 blocks"),
        ("resnet18", [2, 4], "no bottlenecks"),
        ("convnext_atto", [1], "no bottlenecks of a ResNet"),
    ):
        with pytest.raises(UserError, match=words):
            build_backbone(BackboneConfig(name, "none", multi_grid=grid))


def test_rates_reach_their_modules_and_zero_means_zero():
    options: dict[str, Any] = {"dropout": 0.11, "attention_dropout": 0.12, "drop_path": 0.13}
    for name in ("swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "vit_small_patch16_dinov3"):
        backbone = build_backbone(BackboneConfig(name, "none", **options))
        dropped = {module.p for module in backbone.modules() if isinstance(module, nn.Dropout)}
        assert 0.11 in dropped and dropped <= {0.0, 0.11, 0.12}
        assert max(m.drop_prob for m in backbone.modules() if isinstance(m, DropPath)) == pytest.approx(0.13)
        rates = {getattr(m, "dropout", None) for m in backbone.modules()} | dropped
        assert 0.12 in rates
        bare = build_backbone(BackboneConfig(name, "none"))
        assert not any(isinstance(m, DropPath) and m.drop_prob for m in bare.modules())
        assert not any(isinstance(m, nn.Dropout) and m.p for m in bare.modules())


def test_what_a_backbone_does_not_have_is_refused():
    for name, field, value in (
        ("resnet10t", "dropout", 0.1),
        ("resnet10t", "attention_dropout", 0.1),
        ("vgg11", "drop_path", 0.1),
        ("tf_efficientnet_lite0", "dropout", 0.1),
    ):
        changed: dict[str, Any] = {field: value}
        with pytest.raises(UserError, match=rf"model.backbone.{field} = 0.1, but '{name}' has nothing"):
            build_backbone(replace(BackboneConfig(name, "none"), **changed))
    for name, words in {
        "resnt50": "no model 'resnt50'.*resnet50",
        "levit_128": "no features at stride 4, 8, only at",
        "coatnet_nano_rw_224": "does not take images of any size",
        "beit_base_patch16_224": "does not take images of any size",
    }.items():
        with pytest.raises(UserError, match=words):
            build_backbone(BackboneConfig(name, "none"))
    for name, stages in (("resnet10t", [5]), ("resnet10t", [0]), ("hrnet_w18_small", [2])):
        with pytest.raises(UserError, match="no blocks that could be recomputed"):
            build_backbone(BackboneConfig(name, "none", recompute_stages=stages))
    with pytest.raises(UserError, match=r"recompute_stages = \[0, 2\] must hold numbers from 1 to 4"):
        config = Config()
        config.model.backbone.recompute_stages = [0, 2]
        validate(config)


RECOMPUTED = [
    ("resnet10t", {"drop_path": 0.3}, [2, 3]),
    ("tf_efficientnet_lite0", {"drop_path": 0.3}, [1, 2, 3, 4]),
    ("convnext_atto", {"drop_path": 0.3}, [3]),
    ("swin_tiny_patch4_window7_224", {"drop_path": 0.3, "dropout": 0.2, "attention_dropout": 0.2}, [1, 3]),
    ("vit_tiny_patch16_224", {"drop_path": 0.3, "dropout": 0.2, "attention_dropout": 0.2}, [1, 2, 3, 4]),
    ("vit_small_patch16_dinov3", {"drop_path": 0.3}, [4]),
]


def _step(backbone: nn.Module, images: torch.Tensor) -> tuple[int, dict[str, Any]]:
    """Bytes kept for the backward pass, and all gradients."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(feature.square().mean() for feature in backbone(images))
    loss.backward()
    return sum(kept.values()), {name: p.grad for name, p in backbone.named_parameters()}


@pytest.mark.parametrize(("name", "rates", "stages"), RECOMPUTED)
def test_recomputing_changes_memory_and_nothing_else(name, rates, stages):
    torch.manual_seed(0)
    plain = build_backbone(BackboneConfig(name, "none", freeze_norm=False, **rates))
    thrifty = build_backbone(BackboneConfig(name, "none", freeze_norm=False, recompute_stages=stages, **rates))
    assert list(thrifty.state_dict()) == list(plain.state_dict())
    thrifty.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    before = {n: b.clone() for n, b in plain.named_buffers()}
    kept, gradients = _step(plain, images)
    less, again = _step(thrifty, images)
    assert less < 0.9 * kept
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(again[parameter], gradient, msg=parameter)
    buffers = dict(plain.named_buffers())
    for buffer, value in thrifty.named_buffers():
        assert torch.equal(value, buffers[buffer]), buffer
    moved = [n for n, b in buffers.items() if n.endswith("num_batches_tracked") and b != before[n]]
    assert bool(moved) == (name in ("resnet10t", "tf_efficientnet_lite0"))


def test_a_copied_backbone_recomputes_by_itself():
    first: Any = build_backbone(BackboneConfig("resnet10t", "none", recompute_stages=[3]))
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.net.layer3.parameters():
            parameter.zero_()
    images = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(first(images)[2], second(images)[2])


class _Overwriting(nn.Module):
    def forward(self, x):
        return x.relu_() * 2


def test_a_block_that_writes_over_its_input_is_refused():
    from mf_scale.models.recompute import recompute

    block = _Overwriting()
    recompute([block])
    with pytest.raises(UserError, match="writes over its own input"):
        block(torch.randn(3, requires_grad=True) * 1)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_it_compiles_without_a_break_in_the_graph(name):
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name, "none", recompute_stages=[3]))
    images = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(images), backbone(images), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_grid_of_windows_is_padded_to_whole_ones():
    """MaxViT cuts its maps into windows of 8 cells down to stride 32: multiples of 256 pixels."""
    backbone = build_backbone(BackboneConfig("maxvit_nano_rw_256", "none")).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 70, 50))
    assert backbone.multiple == 256 and [tuple(f.shape[-2:]) for f in features] == [(18, 13), (9, 7), (5, 4), (3, 2)]


@pytest.mark.parametrize("name", ["resnest14d", "skresnet18", "rexnet_100"])
def test_a_batch_norm_behind_global_pooling_is_no_obstacle(name):
    with torch.device("meta"):
        assert build_backbone(BackboneConfig(name, "none")).multiple == 1
