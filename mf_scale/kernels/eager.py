"""The mask loss in torch operators: for any device, fp32 and fp64, where no fast kernel serves; and as their measure.

Tensors of the map's resolution exist for a bounded number of pairs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.data.batch import IGNORE
from mf_scale.kernels.settings import Settings
from mf_scale.kernels.targets import checked_targets

_CHUNK_PIXELS = {"cpu": 2**18, "cuda": 2**24}
"""Pixels worked on at once: what stays in a CPU's cache, what fills a GPU."""


def mask_loss(
    logits: Tensor,
    segment_map: Tensor,
    segments: Tensor,
    layers: Tensor,
    counts: Tensor,
    settings: Settings,
    *,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Focal and dice loss [B,P] of logits [B,P,h,w], and the gradient [B,P,h,w] of their weighted sum.

    `segment_map` [B,L,H,W] int16, or uint8 with the same values modulo 256 for T <= 254; `segments`, `layers` [B,P];
    `counts` [B]: pairs behind it give zeros. Reads `counts` on the host. Raises ValueError for what does not fit.
    """
    segment_map, segments, layers, counts = checked_targets(logits, segment_map, segments, layers, counts)
    focal, dice = logits.new_zeros(segments.shape), logits.new_zeros(segments.shape)
    gradient = torch.zeros_like(logits) if want_gradient else None
    rows = interpolation(logits.shape[2], segment_map.shape[2], logits)
    columns = interpolation(logits.shape[3], segment_map.shape[3], logits)
    for b, count in enumerate(counts.tolist()):
        valid = (segment_map[b, 0] != IGNORE).to(logits.dtype) if settings.exclude else None
        for part in _chunks(count, segment_map.shape[2] * segment_map.shape[3], logits.device.type):
            own_layer = segment_map[b] if segment_map.shape[1] == 1 else segment_map[b][layers[b, part]]
            target = (own_layer == segments[b, part, None, None]).to(logits.dtype)
            upsampled = rows @ logits[b, part] @ columns.T
            focal[b, part], dice[b, part], at_map = _pairs(upsampled, target, valid, settings, want_gradient)
            if gradient is not None and at_map is not None:
                torch.matmul(rows.T @ at_map, columns, out=gradient[b, part])
    return focal, dice, gradient


def _pairs(
    z: Tensor, target: Tensor, valid: Tensor | None, settings: Settings, want_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Focal and dice loss [n] of full-resolution logits z [n,H,W], and the gradient of their weighted sum.

    `target` is 1 inside the segment, else 0; `valid` [H,W] is 0 on pixels to leave out. Both may be overwritten.
    Everything follows from u = z (1 - 2 target): the error probability s = sigmoid(u), with ds/du = s (1 - s), and the
    cross-entropy softplus(u), with derivative s. The mask's probability is s outside the segment and 1 - s inside, so
    its sums are sums of s, target and s target.
    """
    alpha, gamma = settings.alpha, settings.gamma
    u = z.mul_(torch.rsub(target, 1, alpha=2))
    s, cross_entropy = u.sigmoid(), F.softplus(u, threshold=40.0)
    power = s * s if gamma == 2 else s**gamma
    unweighted, counted = power * cross_entropy, s
    pixels: Tensor | int = z.shape[1] * z.shape[2]
    if valid is not None:
        target = target.mul_(valid)
        unweighted, counted = unweighted.mul_(valid), s * valid
        pixels = valid.sum().clamp(min=1)
    focal = ((1 - alpha) * _sum(unweighted) - (1 - 2 * alpha) * _sum(unweighted.mul_(target))) / pixels
    mass, wrong, size = _sum(counted), _sum(counted * target), _sum(target)
    numerator = 2 * (size - wrong) + 1
    denominator = mass - 2 * wrong + 2 * size + 1
    dice = 1 - numerator / denominator
    if not want_gradient:
        return focal.flatten(), dice.flatten(), None
    right = 1 - s
    scale = settings.focal_weight / pixels
    gradient = torch.addcmul(s, cross_entropy, right, value=gamma).mul_(power)
    gradient.mul_((1 - alpha - target).mul_(scale))  # alpha of the pixel with the sign of du/dz
    by_probability = torch.addcmul(numerator / denominator**2, target, 2 / denominator, value=-1)
    gradient.addcmul_(by_probability.mul_(s), right, value=settings.dice_weight)
    return focal.flatten(), dice.flatten(), gradient if valid is None else gradient.mul_(valid)


def _sum(pixels: Tensor) -> Tensor:
    return pixels.sum(dim=(1, 2), keepdim=True)


def interpolation(short: int, long: int, like: Tensor) -> Tensor:
    """The matrix [long,short] of linear interpolation (align_corners False); two of them make the bilinear one.

    As products, upsampling is twice as fast on a CPU as torch's operator and its transpose ten times, and the
    transpose adds up in a fixed order on a GPU. Positions are computed in fp64: at odd ratios their rounding in fp32
    is the largest error of the whole loss.
    """
    identity = torch.eye(short, dtype=torch.float64, device=like.device)[None]
    return F.interpolate(identity, size=long, mode="linear", align_corners=False)[0].T.to(like.dtype)


def _chunks(count: int, pixels: int, device_type: str) -> Iterator[slice]:
    size = max(1, _CHUNK_PIXELS[device_type] // pixels)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
