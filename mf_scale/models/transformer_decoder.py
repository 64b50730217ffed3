"""The Transformer decoder: learned queries attend to each other and to the stride-32 map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mf_scale.config.schema import DecoderConfig
from mf_scale.models.multi_head import MultiHeadAttention, TransformerLayer
from mf_scale.models.position import sine_position


class DecoderLayer(TransformerLayer):
    """Self-attention of the queries, cross-attention to the map, feed-forward."""

    def __init__(self, config: DecoderConfig, kernel: str) -> None:
        super().__init__(config.width, config, norms=3)
        self.self_attention = MultiHeadAttention(config.width, config.heads, config.dropout, kernel)
        self.cross_attention = MultiHeadAttention(config.width, config.heads, config.dropout, kernel)

    def forward(self, queries: Tensor, query_position: Tensor, memory: Tensor, memory_key: Tensor) -> Tensor:
        """queries [B,Q,C]; query_position [Q,C]; memory and memory_key (memory with its positions) [B,N,C]."""
        queries = self.add(0, queries, lambda x: self.self_attention(x + query_position, x + query_position, x))
        queries = self.add(1, queries, lambda x: self.cross_attention(x + query_position, memory_key, memory))
        return self.add(2, queries, self.feed_forward)


class TransformerDecoder(nn.Module):
    """Queries after each supervised layer [S,B,Q,width], all through the same final norm.

    Source: MaskFormer section 3.2 with DETR's decoder: queries start at zero, learned embeddings are their positions.
    """

    def __init__(self, channels: int, config: DecoderConfig, kernel: str) -> None:
        """`channels` of the map; where they equal `config.width` it is taken as it is, as in the paper's code."""
        super().__init__()
        self.deep_supervision = config.deep_supervision
        self.project = nn.Identity() if channels == config.width else _projection(channels, config.width)
        self.queries = nn.Embedding(config.queries, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, kernel) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, memory: Tensor) -> Tensor:
        """memory [B,c,h,w] -> [S,B,Q,width]; S is the number of layers, or 1 without deep supervision."""
        memory = self.project(memory)
        height, width = memory.shape[-2:]
        memory = memory.flatten(2).transpose(1, 2)
        position = sine_position(height, width, memory.shape[-1], memory.device)
        memory_key = memory + position.to(memory.dtype)
        query_position = self.queries.weight
        queries = torch.zeros_like(query_position).expand(memory.shape[0], -1, -1)
        outputs = []
        for layer in self.layers:
            queries = layer(queries, query_position, memory, memory_key)
            outputs.append(queries)
        return self.norm(torch.stack(outputs if self.deep_supervision else outputs[-1:]))


def _projection(channels: int, width: int) -> nn.Conv2d:
    projection = nn.Conv2d(channels, width, 1)
    nn.init.kaiming_uniform_(projection.weight, a=1)
    nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
    return projection
