"""Plain vision transformers: their attention in `models.attention`, and a simple feature pyramid on their one map."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.models.attention import attention

PATCH = 16
"""Stride of the one map that the pyramid starts from."""


class TokenAttention(nn.Module):
    """Self-attention over tokens [B,N,C] with everything of timm's module but its softmax; names are timm's.

    Serves timm's `Attention`, `AttentionRope` and `EvaAttention`: one projection to query, key and value or three,
    norms of query and key, rotary positions, fewer key heads than query heads, a gate, a norm of the output.
    """

    q_norm: Any
    k_norm: Any
    attn_drop: Any
    norm: Any
    proj: Any
    proj_drop: Any

    def __init__(self, timms: Any, kernel: str) -> None:
        super().__init__()
        self.kernel, self.heads, self.width = kernel, timms.num_heads, timms.head_dim
        self.prefix = getattr(timms, "num_prefix_tokens", 0)
        self.in_halves = getattr(timms, "rotate_half", False)
        for name, parameter in timms.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in timms.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in timms._non_persistent_buffers_set)
        for name, module in timms.named_children():
            self.add_module(name, module)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x [B,N,C]; rope [..,N without prefix,2 K]: sines, then cosines; attn_mask boolean or added -> [B,N,C]."""
        q, k, v = self._projected(x)
        q, k = (self._rotated(norm(t), rope).to(v.dtype) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        k, v = (t.repeat_interleave(self.heads // t.shape[2], dim=2) if t.shape[2] < self.heads else t for t in (k, v))
        boolean = attn_mask is not None and attn_mask.dtype == torch.bool
        mask = attn_mask if boolean else None
        if is_causal:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        dropout = self.attn_drop.p if self.training else 0.0
        out = attention(q, k, v, None if boolean else attn_mask, mask, self.kernel, dropout)
        out = self.norm(out.flatten(2))
        gate: Any = getattr(self, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B,N,heads,K], key and value [B,N,heads or fewer,K]."""
        part: dict[str, Any] = {**self._modules, **self._parameters, **self._buffers}
        qkv = part.get("qkv")
        if qkv is None:
            projections = part["q_proj"], part["k_proj"], part["v_proj"]
            q, k, v = (project(x).unflatten(2, (-1, self.width)) for project in projections)
            return q, k, v
        bias = qkv.bias
        if part.get("q_bias") is not None:
            bias = torch.cat((part["q_bias"], part["k_bias"], part["v_bias"]))
        q, k, v = F.linear(x, qkv.weight, bias).unflatten(2, (3, self.heads, self.width)).unbind(2)
        return q, k, v

    def _rotated(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """x [B,N,heads,K], its tokens after the prefix turned by their position (Su et al., "RoFormer", 2021)."""
        if rope is None:
            return x
        sine, cosine = rope.chunk(2, dim=-1)
        x = x.transpose(1, 2)
        prefix, placed = x[:, :, : self.prefix], x[:, :, self.prefix :]
        if self.in_halves:
            first, second = placed.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
        else:
            turned = torch.stack((-placed[..., 1::2], placed[..., ::2]), dim=-1).flatten(-2)
        placed = (placed * cosine + turned * sine).to(x.dtype)
        return torch.cat((prefix, placed), dim=2).transpose(1, 2)


def serve_attention(net: nn.Module, kinds: Collection[type], kernel: str) -> int:
    """Replace every module of exactly these timm types by `TokenAttention`, in place; how many there were."""
    holders = [
        (parent, name, child)
        for parent in list(net.modules())
        for name, child in parent.named_children()
        if type(child) in kinds
    ]
    for parent, name, child in holders:
        setattr(parent, name, TokenAttention(child, kernel))
    return len(holders)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of a map [B,C,h,w]."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,h,w] -> [B,C,h,w]."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(nn.Module):
    """Maps at strides 4, 8, 16 and 32, `width` channels each, from the one map [B,C,h,w] at stride 16.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet, 2022).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, 2, stride=2),
                    ChannelNorm(half, eps=1e-6),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ),
                nn.ConvTranspose2d(channels, half, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.outputs = nn.ModuleList(_output(c, width) for c in (quarter, half, channels, channels))

    def forward(self, feature: Tensor) -> list[Tensor]:
        """feature [B,C,h,w] -> maps [B,width,..] of 4h x 4w, 2h x 2w, h x w and half of it, rounded up."""
        return [output(scale(feature)) for scale, output in zip(self.scales, self.outputs, strict=True)]


def _output(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        ChannelNorm(width, eps=1e-6),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        ChannelNorm(width, eps=1e-6),
    )
