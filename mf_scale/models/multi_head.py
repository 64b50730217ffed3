"""Multi-head attention and the feed-forward part: what the layers of encoder and decoder are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.config.schema import DecoderConfig
from mf_scale.models.attention import attention


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


class TransformerLayer(nn.Module):
    """What an encoder and a decoder layer share: norms, dropout, feed-forward, and how a part is added.

    Post-norm (the paper): norm(x + part(x)). Pre-norm: x + part(norm(x)). Source: DETR's two variants.
    """

    def __init__(self, width: int, config: DecoderConfig, norms: int) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.widen = nn.Linear(width, config.feedforward)
        self.narrow = nn.Linear(config.feedforward, width)
        for linear in (self.widen, self.narrow):
            nn.init.xavier_uniform_(linear.weight)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(norms))
        self.dropout = nn.Dropout(config.dropout)

    def add(self, number: int, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """x plus `part` of it, with norm `number` before or after."""
        norm = self.norms[number]
        return x + self.dropout(part(norm(x))) if self.pre_norm else norm(x + self.dropout(part(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C] through the hidden channels."""
        return self.narrow(self.dropout(F.relu(self.widen(x))))
