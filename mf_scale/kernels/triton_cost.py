"""The matching cost on a GPU: three launches for all layers, images and segments.

A logit is made in registers, read by three transcendentals and gone: no buffer of the logits' size exists. What is kept
are the costs, the map at prediction resolution and the sums of each split of the pixels, as large as two of the costs;
the more queries and segments, the fewer splits. Everything is added in a fixed order, so the same input gives the same
bits on the same kind of device. Floor for 16 images x 600 queries of 256 channels at 160 x 160: 126 GFLOP of the
tensor cores and 246 M logits, three transcendentals each; the pixel embeddings are read once a block of 128 queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mf_scale.kernels.triton_mask_loss import LAUNCH, ignore_value, on_device

_PROGRAMS_WANTED = 1024
_LEAST_TILES = 8
_MAP_BLOCK = 1024
_DEEP = 128 * 1024
"""Bytes of shared memory from which loads run two tiles ahead; 116 KiB are used then."""


class CostWeights(NamedTuple):
    """What the matching cost is made with."""

    class_weight: float
    focal_weight: float
    dice_weight: float
    alpha: float
    gamma: float
    exclude: bool
    """Ignored pixels leave every sum; else they are negatives."""


def pairwise_cost(
    probability: Tensor,
    mask_embeddings: Tensor,
    pixel_embeddings: Tensor,
    segment_map: Tensor,
    segment_layer: Tensor,
    weights: CostWeights,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class, focal, dice and total cost in fp32, each [B,N,T]; N counts the queries of all layers.

    `probability` fp32 [B,N,T] of each segment's class; `mask_embeddings` [B,N,C], `pixel_embeddings` [B,C,h,w], each
    fp32, bf16 or fp16; `segment_map` [B,L,H,W] at full resolution (its nearest pixels are read), int16, or uint8 with
    the same values modulo 256 for T <= 254; `segment_layer` int64 [B,T]. Costs of padding segments mean nothing. The
    product of the embeddings takes bf16 as it is and fp32 as TF32, and adds in fp32.
    """
    from mf_scale.kernels import triton_common
    from mf_scale.kernels import triton_cost_kernels as kernels

    (B, N, C), (h, w), T = mask_embeddings.shape, pixel_embeddings.shape[2:], segment_layer.shape[1]
    L, H, W = segment_map.shape[1:]
    if segment_map.dtype == torch.uint8 and T > 254:
        raise ValueError(f"a map of bytes cannot name {T} segments")
    costs = torch.empty(4, B, N, T, dtype=torch.float32, device=segment_layer.device)
    if costs.numel() == 0:
        return costs[0], costs[1], costs[2], costs[3]
    dtype = torch.promote_types(mask_embeddings.dtype, pixel_embeddings.dtype)
    form = blocks(N, C, T, h * w, dtype, triton_common.block_memory(segment_layer.get_device()))
    pixel_tiles = -(-h * w // form["BP"])
    programs = -(-N // form["BN"]) * form["T_BLOCKS"] * B
    splits = max(1, min(-(-_PROGRAMS_WANTED // programs), pixel_tiles // _LEAST_TILES))
    tiles = -(-pixel_tiles // splits)
    splits = -(-pixel_tiles // tiles)
    maps = segment_map.new_empty(B, L, h * w)
    inside, whole, areas = (costs.new_empty(splits, B, size) for size in (2 * N * T, 2 * N, T + 1))
    with on_device(costs):
        kernels.cost_maps[(-(-h * w // _MAP_BLOCK), B * L)](
            segment_map.contiguous(), maps, h, w, H, W, BLOCK=_MAP_BLOCK, **LAUNCH
        )
        kernels.cost_sums[(-(-N // form["BN"]), splits * form["T_BLOCKS"], B)](
            mask_embeddings.to(dtype).contiguous(),
            pixel_embeddings.to(dtype).contiguous(),
            maps,
            segment_layer.contiguous(),
            inside,
            whole,
            areas,
            *(N, C, T, h * w, tiles, float(weights.alpha)),
            GAMMA=float(weights.gamma),
            EXCLUDE=weights.exclude,
            IGNORE=ignore_value(segment_map),
            LAYERS=L,
            GPU=not triton_common.INTERPRETED,
            **form,
        )
        kernels.cost_finish[(N, B)](
            probability.contiguous(),
            inside,
            whole,
            areas,
            costs,
            *(N, T, splits, float(weights.class_weight), float(weights.focal_weight), float(weights.dice_weight)),
            BT=_power_of_two(T, 16, 256),
            num_warps=1,
            **LAUNCH,
        )
    return costs[0], costs[1], costs[2], costs[3]


def blocks(N: int, C: int, T: int, pixels: int, dtype: torch.dtype, memory: int = 0) -> dict[str, int]:
    """Block sizes and launch options of `cost_sums`, from the shape and a block's shared `memory` in bytes.

    By ptxas for sm_90 nothing is spilled for C and h w divisible by 16 and T <= 16; at most 97 KiB of shared memory are
    used, which GPUs since Ampere have. Where there are 128, as on A100 and H100, the pixels of bf16 embeddings are
    loaded two tiles ahead: 0.85 ms instead of 1.10 (H100, 16 images x 600 queries, 160 x 160). Tiles of 64 pixels are
    no faster then, and without loading ahead Triton 3.6 makes code of them that reads outside its shared memory.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    BN, BC, BT = _power_of_two(N, 16, 128 if half else 64), _power_of_two(C, 16, 256), _power_of_two(T, 16, 64)
    return {
        "BN": BN,
        "BP": _power_of_two(pixels, 16, 32),
        "BC": BC,
        "PARTS": -(-C // BC),
        "BT": BT,
        "T_BLOCKS": -(-T // BT),
        "num_warps": 8 if BN == 128 else 4,
        "num_stages": (3 if memory >= _DEEP else 2) if half else 1,
        **LAUNCH,
    }


def _power_of_two(number: int, least: int, most: int) -> int:
    """The power of two that holds `number`, within limits."""
    return max(least, min(most, 1 << (number - 1).bit_length()))
