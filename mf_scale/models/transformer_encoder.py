"""The Transformer encoder on the stride-32 map: every cell attends to every other."""

from __future__ import annotations

from torch import Tensor, nn

from mf_scale.config.schema import DecoderConfig
from mf_scale.models.multi_head import MultiHeadAttention, TransformerLayer
from mf_scale.models.position import sine_position


class EncoderLayer(TransformerLayer):
    """Self-attention and feed-forward."""

    def __init__(self, width: int, config: DecoderConfig, kernel: str) -> None:
        super().__init__(width, config, norms=2)
        self.self_attention = MultiHeadAttention(width, config.heads, config.dropout, kernel)

    def forward(self, cells: Tensor, position: Tensor) -> Tensor:
        """cells [B,N,C], position [N,C]."""
        cells = self.add(0, cells, lambda x: self.self_attention(x + position, x + position, x))
        return self.add(1, cells, self.feed_forward)


class TransformerEncoder(nn.Module):
    """A feature map [B,c,h,w] -> [B,width,h,w].

    Source: the paper's setting for panoptic segmentation with ResNets, DETR's encoder; a final norm with pre-norm only.
    """

    def __init__(self, channels: int, width: int, layers: int, config: DecoderConfig, kernel: str) -> None:
        """`channels` of the feature map; heads, feedforward, dropout and pre_norm are those of `config`."""
        super().__init__()
        self.project = nn.Conv2d(channels, width, 1)
        nn.init.kaiming_uniform_(self.project.weight, a=1)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]
        self.layers = nn.ModuleList(EncoderLayer(width, config, kernel) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if config.pre_norm else nn.Identity()

    def forward(self, feature: Tensor) -> Tensor:
        projected = self.project(feature)
        height, width = projected.shape[-2:]
        cells = projected.flatten(2).transpose(1, 2)
        position = sine_position(height, width, cells.shape[-1], cells.device).to(cells.dtype)
        for layer in self.layers:
            cells = layer(cells, position)
        return self.norm(cells).transpose(1, 2).unflatten(2, (height, width))
