"""The decoders against plain restatements with torch's own modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.config.schema import DecoderConfig
from mf_scale.models.pixel_decoder import PixelDecoder
from mf_scale.models.position import sine_position
from mf_scale.models.transformer_decoder import DecoderLayer, MultiHeadAttention, TransformerDecoder

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


def test_the_transformer_decoder_is_detrs():
    torch.manual_seed(0)
    decoder, feature = TransformerDecoder(12, CONFIG, "auto"), torch.randn(2, 12, 3, 4)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases and norms as well, so that each of them counts
    memory = F.conv2d(feature, decoder.project.weight, decoder.project.bias).flatten(2).transpose(1, 2)
    queries, outputs = torch.zeros(2, 5, 16), []
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        queries = _detr_layer(layer, queries, decoder.queries.weight.expand(2, 5, 16), memory, sine_position(3, 4, 16))
        outputs.append(decoder.norm(queries))
    torch.testing.assert_close(decoder(feature), torch.stack(outputs))


def test_the_pixel_decoder_is_the_papers_fpn():
    torch.manual_seed(0)
    decoder = PixelDecoder([3, 5, 7, 9], width=48, mask_channels=6)
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
    torch.testing.assert_close(
        decoder(features), F.conv2d(top, decoder.mask_features.weight, padding=1), atol=1e-5, rtol=1e-4
    )


def test_dropout_acts_in_training_only_and_follows_torchs_generator():
    decoder, feature = TransformerDecoder(12, DecoderConfig(2, 5, 16, 4, 24, 0.5), "auto"), torch.randn(1, 12, 3, 4)
    torch.manual_seed(3)
    first = decoder(feature)
    assert not torch.equal(decoder(feature), first)
    torch.manual_seed(3)
    assert torch.equal(decoder(feature), first)
    decoder.eval()
    assert torch.equal(decoder(feature), decoder(feature))
