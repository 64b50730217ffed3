"""Plain ViTs: timm's attention through ours, and the simple feature pyramid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import nn

from mf_scale.config.schema import BackboneConfig
from mf_scale.models.backbones import build_backbone
from mf_scale.models.vit import SimplePyramid, TokenAttention

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Attention, {"qkv_bias": True}),
    "with norms and a gate": (
        Attention,
        {"qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": nn.LayerNorm},
    ),
    "EVA": (EvaAttention, {"norm_layer": nn.LayerNorm}),
    "EVA in three": (EvaAttention, {"qkv_fused": False, "scale_norm": False, "rotate_half": True}),
    "DINOv3": (EvaAttention, {"qkv_bias": False, "scale_norm": False, "num_prefix_tokens": 5, "rotate_half": True}),
    "rotary": (AttentionRope, {"qk_norm": True, "norm_layer": nn.LayerNorm}),
    "fewer key heads": (AttentionRope, {"qkv_fused": False, "num_kv_heads": 2, "num_prefix_tokens": 0}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_token_attention_is_timms_in_value_and_gradient(kind, kernel):
    torch.manual_seed(0)
    build, options = KINDS[kind]
    theirs = build(32, num_heads=4, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = TokenAttention(copy.deepcopy(theirs), kernel)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 13, 32)
    named = {"rope": torch.randn(13 - theirs.num_prefix_tokens, 16)} if hasattr(theirs, "num_prefix_tokens") else {}
    open_mask = torch.rand(13, 13) > 0.3
    for more in (
        {},
        {"attn_mask": open_mask.fill_diagonal_(True)},
        {"attn_mask": torch.randn(13, 13)},
        {"is_causal": True},
    ):
        answers = []
        for module in (theirs, ours):
            out = module(x, **named, **more)
            answers.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
        for wanted, got in zip(*answers, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5 * max(1.0, float(wanted.detach().abs().max())), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", (64, 96)),
        ("deit_tiny_distilled_patch16_224", (48, 32)),
        ("vit_small_patch14_dinov2", (64, 48)),
        ("vit_small_patch16_dinov3", (64, 96)),
        ("eva02_tiny_patch14_224", (64, 48)),
    ],
)
def test_the_whole_network_is_timms(name, size):
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name, "none")).eval()
    assert any("12 of 12 blocks" in note for note in backbone.notes)
    classifier: Any = timm.create_model(name)
    grid = classifier.patch_embed.grid_size
    theirs = timm.create_model(
        name, features_only=True, out_indices=1, dynamic_img_size=True, patch_size=16, img_size=[16 * g for g in grid]
    ).eval()
    theirs.load_state_dict(backbone.net.state_dict())
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(backbone.net(images)[0], theirs(images)[0], atol=1e-5, rtol=1e-5)


def test_dropout_of_the_attention_acts_in_training_only():
    backbone = build_backbone(BackboneConfig("vit_tiny_patch16_224", "none", attention_dropout=0.5))
    images = torch.randn(1, 3, 32, 32)
    assert not torch.equal(backbone(images)[2], backbone(images)[2])
    backbone.eval()
    assert torch.equal(backbone(images)[2], backbone(images)[2])


def test_the_pyramid_is_that_of_vitdet():
    pyramid = SimplePyramid(48, 16)
    maps = pyramid(torch.randn(2, 48, 3, 5))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 12, 20), (2, 16, 6, 10), (2, 16, 3, 5), (2, 16, 2, 3)]
    names = {name.rsplit(".", 1)[0] for name, _ in pyramid.named_parameters()}
    assert {"scales.0.0", "scales.0.1", "scales.0.3", "scales.1"} <= names and len(names) == 4 + 4 * 4
    for m in maps:  # each pixel's channels are normalised
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m.mean(1)), atol=1e-5, rtol=0)


def test_its_norms_do_not_decay():
    from mf_scale.config.schema import OptimizerConfig
    from mf_scale.training.optimizer import parameter_groups

    backbone: Any = build_backbone(BackboneConfig("vit_tiny_patch16_224", "none"))
    groups = {g["name"]: {id(p) for p in g["params"]} for g in parameter_groups(backbone, OptimizerConfig())}
    norms = [p for name, p in backbone.pyramid.named_parameters() if p.ndim == 1 and "outputs" in name]
    assert len(norms) == 16 and all(id(p) in groups["rest/no_decay"] for p in norms)
