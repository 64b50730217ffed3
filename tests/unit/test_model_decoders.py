"""The decoders against plain restatements with torch's own modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.config.schema import DecoderConfig, ModelConfig, PixelDecoderConfig
from mf_scale.models.multi_head import MultiHeadAttention
from mf_scale.models.pixel_decoder import PixelDecoder
from mf_scale.models.position import sine_position
from mf_scale.models.transformer_decoder import DecoderLayer, TransformerDecoder
from mf_scale.models.transformer_encoder import EncoderLayer, TransformerEncoder

CONFIG = DecoderConfig(layers=2, queries=5, width=16, heads=4, feedforward=24, dropout=0.0)


def _torch_attention(own: MultiHeadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    other = nn.MultiheadAttention(16, 4, batch_first=True)
    parts = (own.query, own.key, own.value)
    other.load_state_dict(
        {
            "in_proj_weight": torch.cat([p.weight for p in parts]),
            "in_proj_bias": torch.cat([p.bias for p in parts]),
            "out_proj.weight": own.output.weight,
            "out_proj.bias": own.output.bias,
        }
    )
    return other(query, key, value)[0]


def _detr_layer(own: DecoderLayer, queries: Tensor, query_position: Tensor, memory: Tensor, position: Tensor) -> Tensor:
    """DETR's post-norm decoder layer: positions are added to queries and keys of attention, never to values."""
    placed = queries + query_position
    queries = own.norms[0](queries + _torch_attention(own.self_attention, placed, placed, queries))
    found = _torch_attention(own.cross_attention, queries + query_position, memory + position, memory)
    queries = own.norms[1](queries + found)
    return own.norms[2](queries + own.narrow(F.relu(own.widen(queries))))


def _pre_norm_layer(own: DecoderLayer, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor) -> Tensor:
    """DETR's pre-norm variant: each part sees the normalised queries, the sum itself is never normalised."""
    y = own.norms[0](x)
    x = x + _torch_attention(own.self_attention, y + query_position, y + query_position, y)
    x = x + _torch_attention(own.cross_attention, own.norms[1](x) + query_position, memory + position, memory)
    return x + own.narrow(F.relu(own.widen(own.norms[2](x))))


def _shaken(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases and norms as well, so that each of them counts
    return module


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_transformer_decoder_is_detrs(pre_norm):
    torch.manual_seed(0)
    decoder = TransformerDecoder(12, replace(CONFIG, pre_norm=pre_norm), "auto")
    _shaken(decoder)
    feature = torch.randn(2, 12, 3, 4)
    assert isinstance(decoder.project, nn.Conv2d)
    memory = F.conv2d(feature, decoder.project.weight, decoder.project.bias).flatten(2).transpose(1, 2)
    queries, outputs = torch.zeros(2, 5, 16), []
    layer_of_detr = _pre_norm_layer if pre_norm else _detr_layer
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        position = sine_position(3, 4, 16)
        queries = layer_of_detr(layer, queries, decoder.queries.weight.expand(2, 5, 16), memory, position)
        outputs.append(decoder.norm(queries))
    torch.testing.assert_close(decoder(feature), torch.stack(outputs), atol=1e-5, rtol=1e-4)


def test_a_map_of_the_decoders_width_is_taken_as_it_is():
    assert isinstance(TransformerDecoder(16, CONFIG, "auto").project, nn.Identity)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_transformer_encoder_is_detrs(pre_norm):
    """torch's own encoder layer with the positions added to queries and keys is what DETR's is."""
    torch.manual_seed(0)
    encoder = TransformerEncoder(12, 16, 2, replace(CONFIG, pre_norm=pre_norm), "auto")
    _shaken(encoder)
    feature, position = torch.randn(2, 12, 3, 4), sine_position(3, 4, 16)
    x = F.conv2d(feature, encoder.project.weight, encoder.project.bias).flatten(2).transpose(1, 2)
    for layer in encoder.layers:
        assert isinstance(layer, EncoderLayer)
        own, norms = layer.self_attention, layer.norms
        y = norms[0](x) if pre_norm else x
        x = x + _torch_attention(own, y + position, y + position, y)
        x = x if pre_norm else norms[0](x)
        x = x + layer.narrow(F.relu(layer.widen(norms[1](x) if pre_norm else x)))
        x = x if pre_norm else norms[1](x)
    wanted = encoder.norm(x).transpose(1, 2).reshape(2, 16, 3, 4)
    torch.testing.assert_close(encoder(feature), wanted, atol=1e-5, rtol=1e-4)
    assert isinstance(encoder.norm, nn.LayerNorm) == pre_norm


def test_with_an_encoder_both_the_pyramid_and_the_queries_take_its_output():
    torch.manual_seed(0)
    config = ModelConfig(pixel_decoder=PixelDecoderConfig(16, 6, encoder_layers=2), decoder=CONFIG)
    decoder = PixelDecoder([3, 5, 7, 9], config)
    features = [torch.randn(2, c, s, s) for c, s in zip([3, 5, 7, 9], [16, 8, 4, 2], strict=True)]
    encoded = decoder.encoder(features[-1])
    plain = PixelDecoder([3, 5, 7, 16], replace(config, pixel_decoder=PixelDecoderConfig(16, 6)))
    plain.load_state_dict({n: t for n, t in decoder.state_dict().items() if not n.startswith("encoder.")})
    wanted, _ = plain([*features[:-1], encoded])
    embeddings, memory = decoder(features)
    torch.testing.assert_close(embeddings, wanted)
    torch.testing.assert_close(memory, encoded)
    assert decoder.memory_channels == memory.shape[1] == 16


def test_the_pixel_decoder_is_the_papers_fpn():
    torch.manual_seed(0)
    decoder = PixelDecoder([3, 5, 7, 9], ModelConfig(pixel_decoder=PixelDecoderConfig(width=48, mask_channels=6)))
    features = [
        torch.randn(2, c, *size) for c, size in zip([3, 5, 7, 9], [(16, 21), (8, 11), (4, 6), (2, 3)], strict=True)
    ]

    def convolved(block: nn.Module, x: Tensor) -> Tensor:
        convolution, norm = block.children()
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.GroupNorm)
        y = F.conv2d(x, convolution.weight, padding=convolution.weight.shape[-1] // 2)
        return F.group_norm(y, 16, norm.weight, norm.bias)  # the largest divisor of 48 that divides 32

    top = convolved(decoder.coarsest, features[3]).relu()
    for step, feature in enumerate(reversed(features[:3])):
        rows = torch.arange(feature.shape[2]) * top.shape[2] // feature.shape[2]
        columns = torch.arange(feature.shape[3]) * top.shape[3] // feature.shape[3]
        grown = top[:, :, rows[:, None], columns]
        top = convolved(decoder.smooths[step], convolved(decoder.laterals[step], feature) + grown).relu()
    embeddings, memory = decoder(features)
    torch.testing.assert_close(embeddings, F.conv2d(top, decoder.mask_features.weight, padding=1), atol=1e-5, rtol=1e-4)
    assert memory is features[-1] and decoder.memory_channels == 9


def test_dropout_acts_in_training_only_and_follows_torchs_generator():
    decoder, feature = TransformerDecoder(12, DecoderConfig(2, 5, 16, 4, 24, 0.5), "auto"), torch.randn(1, 12, 3, 4)
    torch.manual_seed(3)
    first = decoder(feature)
    assert not torch.equal(decoder(feature), first)
    torch.manual_seed(3)
    assert torch.equal(decoder(feature), first)
    decoder.eval()
    assert torch.equal(decoder(feature), decoder(feature))
