"""Swin Transformer blocks as in the original, on timm's parameters; their attention runs in `models.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.models.attention import attention

_HIDDEN = -100.0
"""Added to scores between regions that are neighbours by the cyclic shift only (the original's number)."""


class WindowAttention(nn.Module):
    """Attention inside the windows of a map [B,H,W,C], shifted by `shift`; parameters and names are timm's.

    As in Liu et al., "Swin Transformer" (2021) and its use in MaskFormer: zeros below and right fill the last windows
    first, the shift comes after. Windows differ in their shift mask only by lying in the last row, the last column,
    both or neither: so there are at most four calls of `attention`, each with one bias [1,heads,M,M] for all its
    windows, and no bias is made for every window.
    """

    shift_bias: Tensor
    relative_position_index: Tensor

    def __init__(self, timms: Any, window: tuple[int, int], shift: tuple[int, int], kernel: str) -> None:
        super().__init__()
        self.heads, self.window, self.shift, self.kernel = timms.num_heads, window, shift, kernel
        self.dropout = timms.attn_drop.p
        self.relative_position_bias_table = timms.relative_position_bias_table
        self.register_buffer("relative_position_index", timms.relative_position_index, persistent=False)
        self.register_buffer("shift_bias", shift_bias(window, shift), persistent=False)
        self.qkv, self.proj, self.proj_drop = timms.qkv, timms.proj, timms.proj_drop

    def forward(self, x: Tensor) -> Tensor:
        """x [B,H,W,C] -> [B,H,W,C]."""
        height, width = x.shape[1:3]
        bottom, right = -height % self.window[0], -width % self.window[1]
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        bias = self._position_bias()
        rows = [
            torch.cat([self._attend(x[:, top, left], bias + self.shift_bias[i, j]) for j, left in self._bands(x, 1)], 2)
            for i, top in self._bands(x, 0)
        ]
        x = torch.cat(rows, 1)
        if any(self.shift):
            x = x.roll(self.shift, (1, 2))
        return self.proj_drop(self.proj(x[:, :height, :width]))

    def _position_bias(self) -> Tensor:
        """[1,heads,M,M]"""
        cells = self.window[0] * self.window[1]
        table = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return table.view(1, cells, cells, self.heads).permute(0, 3, 1, 2)

    def _bands(self, x: Tensor, axis: int) -> list[tuple[int, slice]]:
        """The windows along an axis as spans of cells: (0, all but the last), (1, the last); those that are empty out.

        Unshifted windows are all alike.
        """
        length, window = x.shape[1 + axis], self.window[axis]
        if not self.shift[axis]:
            return [(0, slice(0, length))]
        last = (1, slice(length - window, length))
        return [(0, slice(0, length - window)), last] if length > window else [last]

    def _attend(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B,h,w,C], whole windows, with one bias [1,heads,M,M] for all of them -> [B,h,w,C] before `proj`."""
        tall, wide = self.window
        b, h, w, c = x.shape
        x = x.view(b, h // tall, tall, w // wide, wide, c).transpose(2, 3).reshape(-1, tall * wide, c)
        q, k, v = self.qkv(x).view(x.shape[0], tall * wide, 3, self.heads, -1).unbind(2)
        out = attention(
            q, k, v, bias, kernel=self.kernel, dropout=self.dropout if self.training else 0.0, open_rows=True
        )
        out = out.reshape(b, h // tall, w // wide, tall, wide, -1).transpose(2, 3)
        return out.reshape(b, h, w, -1)


class SwinBlock(nn.Module):
    """Window attention and feed-forward, each behind a norm and added; parameters and names are timm's."""

    def __init__(self, timms: Any, kernel: str) -> None:
        super().__init__()
        self.norm1 = timms.norm1
        self.attn = WindowAttention(timms.attn, timms.window_size, timms.shift_size, kernel)
        self.drop_path1 = timms.drop_path1
        self.norm2 = timms.norm2
        self.mlp = timms.mlp
        self.drop_path2 = timms.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        """x [B,H,W,C] -> [B,H,W,C]."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def shift_bias(window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """[2,2,M,M]: what is added to the scores of a window by (is in the last row, is in the last column).

    In the last row the cells below `window - shift` came from the other end of the map; so in the last column.
    """
    below = torch.arange(window[0]) >= window[0] - shift[0]
    beyond = torch.arange(window[1]) >= window[1] - shift[1]
    rows = below[:, None].expand(window).flatten()
    columns = beyond[None, :].expand(window).flatten()
    row_cut = rows[:, None] != rows[None, :]
    column_cut = columns[:, None] != columns[None, :]
    nothing = torch.zeros_like(row_cut)
    cuts = torch.stack([nothing, column_cut, row_cut, row_cut | column_cut])
    return (cuts * _HIDDEN).unflatten(0, (2, 2))


def restore_original(net: nn.Module, kernel: str) -> int:
    """Make timm's Swin feature extractor, built with always_partition, compute what the original does, in place.

    (timm shifts first and pads then.) How many blocks there are.
    """
    stages = [stage for stage in net.children() if hasattr(stage, "blocks")]
    count = 0
    for stage in stages:
        blocks: Any = stage.blocks
        for index, block in enumerate(blocks):
            blocks[index] = SwinBlock(block, kernel)
        count += len(blocks)
    return count
