"""Swin blocks equal the original, window by window, at any size, with the bias inside the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from mf_scale.config.schema import BackboneConfig
from mf_scale.models.backbones import build_backbone
from mf_scale.models.swin import SwinBlock, WindowAttention, shift_bias

NAME = "swin_tiny_patch4_window7_224"


@pytest.fixture(scope="module")
def ours():
    backbone = build_backbone(BackboneConfig(NAME, "none")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():  # far enough from zero for every part to matter
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim == 1 else 0.02))
    return backbone


def _their_state(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under the names of transformers' MaskFormerSwinBackbone."""
    names = {
        "net.patch_embed.proj.": "model.embeddings.patch_embeddings.projection.",
        "net.patch_embed.norm.": "model.embeddings.norm.",
        "norms.": "hidden_states_norms.",
        "net.layers_": "model.encoder.layers.",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".attn.relative": ".attention.self.relative",
        ".attn.proj.": ".attention.output.dense.",
        ".mlp.fc1.": ".intermediate.dense.",
        ".mlp.fc2.": ".output.dense.",
    }
    state = {}
    for name, tensor in own.items():
        if ".downsample." in name:  # at the end of a stage there, at the start of the next one here
            stage, rest = name.removeprefix("net.layers_").split(".", 1)
            name = f"net.layers_{int(stage) - 1}.{rest}"  # noqa: PLW2901
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.self.{part}.")] = third
        else:
            state[name] = tensor
    return state


@pytest.fixture(scope="module")
def theirs(ours):
    swin = pytest.importorskip("transformers.models.maskformer.modeling_maskformer_swin")
    from transformers import MaskFormerSwinConfig

    configured: Any = MaskFormerSwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    model = swin.MaskFormerSwinBackbone(configured(drop_path_rate=0.0, out_features=stages)).eval()
    missing, unexpected = model.load_state_dict(_their_state(ours.state_dict()), strict=False)
    assert not unexpected
    assert all("relative_position_index" in name or name.startswith("model.layernorm.") for name in missing)
    return model


@pytest.mark.parametrize("size", [(64, 96), (70, 50), (33, 130), (1, 1)])
def test_every_output_is_that_of_transformers(ours, theirs, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for got, wanted in zip(ours(images), theirs(images).feature_maps, strict=True):
            assert wanted.std() > 0.5
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_transformers(ours, theirs):
    images = torch.randn(1, 3, 70, 50, generator=torch.Generator().manual_seed(2))
    for model, features in ((ours, lambda: ours(images)), (theirs, lambda: theirs(images).feature_maps)):
        model.zero_grad()
        sum(feature.square().mean() for feature in features()).backward()
    gradients = _their_state({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        if not name.startswith("model.layernorm."):
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_where_no_padding_is_needed_and_the_map_is_large_timm_agrees(ours):
    """timm differs only where it pads, or where it shrinks or unshifts windows of small maps."""
    net: Any = timm.create_model(NAME, features_only=True, strict_img_size=False)
    block = net.layers_0.blocks[1].eval()
    x = torch.randn(2, 14, 21, 96, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(SwinBlock(block, "auto")(x), block(x), atol=1e-5, rtol=1e-5)
        odd = torch.randn(1, 16, 21, 96)
        assert (SwinBlock(block, "auto")(odd) - block(odd)).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(18, 13), (7, 7), (28, 14), (3, 2)])
def test_the_shift_masks_are_those_of_transformers(theirs, size):
    layer = theirs.model.encoder.layers[0].blocks[1]
    height, width = (-(-side // 7) * 7 for side in size)
    wanted = layer.get_attn_mask((height, width)).view(height // 7, width // 7, 49, 49)
    bias = shift_bias((7, 7), (3, 3))
    for row in range(height // 7):
        for column in range(width // 7):
            mine = bias[int(row == height // 7 - 1), int(column == width // 7 - 1)]
            assert torch.equal(mine, wanted[row, column])


@pytest.mark.parametrize(
    ("size", "shift", "calls"), [((19, 19), 3, 4), ((19, 19), 0, 1), ((5, 19), 3, 2), ((5, 5), 3, 1)]
)
def test_a_block_needs_at_most_four_calls_each_with_one_bias(ours, monkeypatch, size, shift, calls):
    from mf_scale.models import swin as room

    seen, real = [], room.attention

    def counted(q, k, v, bias, **named):
        seen.append((q.shape, bias.shape))
        return real(q, k, v, bias, **named)

    monkeypatch.setattr(room, "attention", counted)
    attention: WindowAttention = ours.net.layers_0.blocks[1 if shift else 0].attn
    attention(torch.randn(2, *size, 96))
    assert len(seen) == calls and {bias for _, bias in seen} == {(1, 3, 49, 49)}
    assert sum(windows[0] for windows, _ in seen) == 2 * -(-size[0] // 7) * -(-size[1] // 7)


def test_dropout_of_the_attention_acts_in_training_only():
    dropped: Any = build_backbone(BackboneConfig(NAME, "none", attention_dropout=0.9))
    x = torch.randn(1, 7, 7, 96)
    attention = dropped.net.layers_0.blocks[0].attn
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
