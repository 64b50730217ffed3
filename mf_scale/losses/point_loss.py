"""Focal and dice loss at sampled points instead of all pixels, most of them where the mask is uncertain.

Source: Mask2Former (Cheng et al. 2022, section 3.3) after PointRend: of `OVERSAMPLE` x N uniform points the
`IMPORTANT` x N most uncertain are kept, the rest of the N is uniform.

Which points: a function of torch's seed and the image's key, whatever other images are in the micro-batch. Training
seeds every micro-batch from the step, so a resumed run repeats its points; validation seeds with a constant.
On CUDA the backward of torch's grid_sample adds atomically: gradients there repeat to rounding. A deterministic run
gathers instead, which repeats bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig
from mf_scale.data.batch import IGNORE

OVERSAMPLE = 3.0
IMPORTANT = 0.75


def point_losses(
    logits: Tensor,
    segment_map: Tensor,
    segments: Tensor,
    layers: Tensor,
    counts: Tensor,
    config: LossConfig,
    keys: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss [B,P] of logits [B,P,h,w] at `config.points` points a pair, differentiable; 0 for padding.

    Arguments as those of `mask_loss`; fp32. Targets are the segment's mask, interpolated as the logits are. Under
    `exclude` points on ignored pixels leave the sums. Reads `counts` on the host: how many points an image draws.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        points = _choose_points(wide, config.points, counts.tolist(), keys)
        target, valid = _targets(segment_map, segments, layers, points)
        if config.ignored_pixels != "exclude":
            valid = torch.ones_like(valid)
        real = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
    z = sample_bilinear(wide.flatten(0, 1)[:, None], points.flatten(0, 1))[:, 0].unflatten(0, logits.shape[:2])
    s, n = z.sigmoid(), valid.sum(-1).clamp(min=1)
    of_target = s * target + (1 - s) * (1 - target)
    balance = config.focal_alpha * target + (1 - config.focal_alpha) * (1 - target)
    entropy = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    focal = (balance * (1 - of_target) ** config.focal_gamma * entropy * valid).sum(-1) / n
    s, target = s * valid, target * valid
    dice = 1 - (2 * (s * target).sum(-1) + 1) / (s.sum(-1) + target.sum(-1) + 1)
    return torch.where(real, focal, 0.0), torch.where(real, dice, 0.0)


def sample_bilinear(maps: Tensor, points: Tensor) -> Tensor:
    """Values [n,c,N] of maps [n,c,h,w] at points [n,N,2], (x, y) in 0..1; pixel centres at halves, borders repeated."""
    if maps.is_cuda and maps.requires_grad and torch.are_deterministic_algorithms_enabled():
        return gather_bilinear(maps, points)
    grid = 2 * points[:, None] - 1
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]


def gather_bilinear(maps: Tensor, points: Tensor) -> Tensor:
    """The same by four gathers, whose backward torch can make in a fixed order."""
    h, w = maps.shape[2:]
    flat = maps.flatten(2)
    x, y = (points[..., 0] * w - 0.5).clamp(0, w - 1), (points[..., 1] * h - 0.5).clamp(0, h - 1)
    left, top = x.floor(), y.floor()
    result = torch.zeros((), dtype=maps.dtype, device=maps.device)
    for row, of_row in ((top, top + 1 - y), (top + 1, y - top)):
        for column, of_column in ((left, left + 1 - x), (left + 1, x - left)):
            cell = row.clamp(max=h - 1).long() * w + column.clamp(max=w - 1).long()
            value = flat.gather(2, cell[:, None].expand(-1, maps.shape[1], -1))
            result = result + (of_row * of_column)[:, None] * value
    return result


def _choose_points(logits: Tensor, count: int, pairs: Sequence[int], keys: Sequence[str]) -> Tensor:
    """Points [B,P,N,2]: the most uncertain of many (logit nearest 0) and some at random; padding pairs have (0, 0)."""
    many_count, important = int(OVERSAMPLE * count), int(IMPORTANT * count)
    drawn = logits.new_zeros(*logits.shape[:2], many_count + count - important, 2)
    for image, real, key in zip(drawn, pairs, keys, strict=True):
        image[:real].uniform_(generator=_generator(key, logits.device))
    many, rest = drawn.flatten(0, 1).split((many_count, count - important), dim=1)
    uncertainty = -sample_bilinear(logits.flatten(0, 1)[:, None], many)[:, 0].abs()
    best = uncertainty.topk(important, dim=1).indices
    return torch.cat((many.gather(1, best[..., None].expand(-1, -1, 2)), rest), dim=1).unflatten(0, logits.shape[:2])


def _generator(key: str, device: torch.device) -> torch.Generator:
    """An image's own random numbers; hashed, so they are apart from the model's, which start from the same seed."""
    digest = hashlib.blake2b(f"points/{torch.initial_seed()}/{key}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _targets(segment_map: Tensor, segments: Tensor, layers: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Share [B,P,N] of the segment in the four pixels around each point, and whether its own pixel counts (1 or 0)."""
    L, H, W = segment_map.shape[1:]
    flat = segment_map.flatten(1)
    offset = layers.clamp(0, L - 1)[..., None] * (H * W)
    x, y = points[..., 0] * W - 0.5, points[..., 1] * H - 0.5
    left, top = x.floor(), y.floor()
    target = torch.zeros_like(x)
    for row, of_row in ((top, top + 1 - y), (top + 1, y - top)):
        for column, of_column in ((left, left + 1 - x), (left + 1, x - left)):
            cell = row.clamp(0, H - 1).long() * W + column.clamp(0, W - 1).long()
            value = flat.gather(1, (cell + offset).flatten(1)).view_as(cell)
            target += of_row * of_column * (value == segments[..., None])
    own = (points[..., 1] * H).long().clamp(max=H - 1) * W + (points[..., 0] * W).long().clamp(max=W - 1)
    counted = flat.gather(1, own.flatten(1)).view_as(own) != IGNORE
    return target, counted.to(points.dtype)
