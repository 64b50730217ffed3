"""The Transformer decoder: learned queries attend to each other and to the stride-32 map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.config.schema import DecoderConfig
from mf_scale.models.attention import attention
from mf_scale.models.position import sine_position


class MultiHeadAttention(nn.Module):
    """Multi-head attention whose softmax runs in `models.attention`."""

    def __init__(self, width: int, heads: int, dropout: float, kernel: str) -> None:
        super().__init__()
        self.heads, self.dropout, self.kernel = heads, dropout, kernel
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        for projection in (self.query, self.key, self.value):
            # Xavier over the three stacked, as DETR initialises its single input projection
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.output.weight)
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B,M,C], key and value [B,N,C] -> [B,M,C]."""
        projected = self.query(query), self.key(key), self.value(value)
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in projected)
        out = attention(q, k, v, kernel=self.kernel, dropout=self.dropout if self.training else 0.0)
        return self.output(out.flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; each added, then normalised (post-norm, as in DETR)."""

    def __init__(self, config: DecoderConfig, kernel: str) -> None:
        super().__init__()
        width = config.width
        self.self_attention = MultiHeadAttention(width, config.heads, config.dropout, kernel)
        self.cross_attention = MultiHeadAttention(width, config.heads, config.dropout, kernel)
        self.widen = nn.Linear(width, config.feedforward)
        self.narrow = nn.Linear(config.feedforward, width)
        for linear in (self.widen, self.narrow):
            nn.init.xavier_uniform_(linear.weight)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, query_position: Tensor, memory: Tensor, memory_key: Tensor) -> Tensor:
        """queries [B,Q,C]; query_position [Q,C]; memory and memory_key (memory with its positions) [B,N,C]."""
        placed = queries + query_position
        queries = self.norms[0](queries + self.dropout(self.self_attention(placed, placed, queries)))
        found = self.cross_attention(queries + query_position, memory_key, memory)
        queries = self.norms[1](queries + self.dropout(found))
        hidden = self.narrow(self.dropout(F.relu(self.widen(queries))))
        return self.norms[2](queries + self.dropout(hidden))


class TransformerDecoder(nn.Module):
    """Queries after each supervised layer [S,B,Q,width], all through the same final norm.

    Source: MaskFormer section 3.2 with DETR's decoder: queries start at zero, learned embeddings are their positions.
    """

    def __init__(self, channels: int, config: DecoderConfig, kernel: str) -> None:
        """`channels` of the stride-32 feature map."""
        super().__init__()
        self.deep_supervision = config.deep_supervision
        self.project = nn.Conv2d(channels, config.width, 1)
        nn.init.kaiming_uniform_(self.project.weight, a=1)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]
        self.queries = nn.Embedding(config.queries, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, kernel) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, feature: Tensor) -> Tensor:
        """feature [B,c,h,w] at stride 32 -> [S,B,Q,width]; S is the number of layers, or 1 without deep supervision."""
        memory = self.project(feature)
        height, width = memory.shape[-2:]
        memory = memory.flatten(2).transpose(1, 2)
        position = sine_position(height, width, memory.shape[-1], memory.device)
        memory_key = memory + position.to(memory.dtype)
        query_position = self.queries.weight
        queries = torch.zeros_like(query_position).expand(len(memory), -1, -1)
        outputs = []
        for layer in self.layers:
            queries = layer(queries, query_position, memory, memory_key)
            outputs.append(queries)
        return self.norm(torch.stack(outputs if self.deep_supervision else outputs[-1:]))
