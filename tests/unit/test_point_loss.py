"""The point-sampled loss: equal to a dense statement at its points, near the full loss, repeated by the seed."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig
from mf_scale.data.batch import IGNORE
from mf_scale.losses import point_loss as room
from mf_scale.losses.mask_loss import mask_loss
from mf_scale.losses.point_loss import point_losses
from mf_scale.losses.reference import dense_mask
from tests.random_batches import random_batch


class Pairs(NamedTuple):
    """What is compared."""

    logits: torch.Tensor
    segment_map: torch.Tensor
    segments: torch.Tensor
    layers: torch.Tensor
    counts: torch.Tensor


def _arguments(segments=(3, 1), size=(48, 64), cells=(12, 16), map_layers=1, dtype=torch.float64) -> Pairs:
    batch = random_batch(list(segments), size, map_layers=map_layers)
    counts, P = torch.tensor(segments), max(1, *segments)
    index = torch.arange(P).repeat(len(counts), 1)
    layers = F.pad(batch.segment_layer, (0, 1)).gather(1, index.clamp(max=batch.labels.shape[1]))
    logits = torch.randn(len(counts), P, *cells, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Pairs((logits.to(dtype) * 3).requires_grad_(), batch.segment_map, index, layers, counts)


@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
@pytest.mark.parametrize("map_layers", [1, 2])
def test_equals_a_dense_statement_at_its_points(ignored_pixels, map_layers):
    logits, segment_map, segments, layers, counts = _arguments(map_layers=map_layers)
    config = LossConfig(points=64, ignored_pixels=ignored_pixels)
    torch.manual_seed(5)
    focal, dice = point_losses(logits, segment_map, segments, layers, counts, config)
    points = room._choose_points(logits.detach(), 64)
    for b, count in enumerate(counts.tolist()):
        for p in range(count):
            mask = dense_mask(segment_map[b], int(layers[b, p]), p).double()
            at = points[b, p][None]
            z = room.sample_bilinear(logits[b, p][None, None], at)[0, 0]
            t = room.sample_bilinear(mask[None, None], at)[0, 0]
            pixel = (points[b, p] * torch.tensor([64, 48])).long()
            kept = (segment_map[b, 0, pixel[:, 1], pixel[:, 0]] != IGNORE) | (ignored_pixels == "negative")
            z, t = z[kept], t[kept]
            s = z.sigmoid()
            right = s * t + (1 - s) * (1 - t)
            entropy = F.binary_cross_entropy_with_logits(z, t, reduction="none")
            wanted = ((0.25 * t + 0.75 * (1 - t)) * (1 - right) ** 2 * entropy).mean()
            torch.testing.assert_close(focal[b, p], wanted)
            torch.testing.assert_close(dice[b, p], 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1))
    assert (focal[1, 1:] == 0).all() and (dice[1, 1:] == 0).all()


def test_three_quarters_of_the_points_are_where_the_mask_is_uncertain():
    logits = _arguments().logits
    points = room._choose_points(logits.detach(), 400)
    values = room.sample_bilinear(logits.detach().flatten(0, 1)[:, None], points.flatten(0, 1))[:, 0].abs()
    assert values[:, :300].mean() < 0.6 * values[:, 300:].mean()
    assert points.min() >= 0 and points.max() <= 1 and points.shape == (2, 3, 400, 2)


def test_uniform_points_estimate_the_loss_of_all_pixels(monkeypatch):
    monkeypatch.setattr(room, "IMPORTANT", 0.0)
    arguments = _arguments()
    full = mask_loss(*arguments, config=LossConfig())
    sampled = mask_loss(*arguments, config=LossConfig(points=20_000))
    torch.testing.assert_close(sampled.focal, full.focal, rtol=0.05, atol=1e-3)


def test_the_seed_of_the_micro_batch_alone_decides_the_points():
    arguments = _arguments()

    def total(seed, spent):
        torch.manual_seed(seed)
        torch.rand(spent)  # what dropout takes does not matter
        return mask_loss(*arguments, config=LossConfig(points=50)).total

    assert torch.equal(total(3, 0), total(3, 17)) and not torch.equal(total(3, 0), total(4, 0))


def test_gradients_reach_the_logits_of_real_pairs_only():
    pairs = _arguments(dtype=torch.float32)
    mask_loss(*pairs, config=LossConfig(points=100)).total.backward()
    assert pairs.logits.grad is not None and pairs.logits.grad.isfinite().all()
    assert (pairs.logits.grad[1, 1:] == 0).all() and (pairs.logits.grad[0] != 0).any()


def test_no_segment_is_no_loss():
    pairs = _arguments(segments=(0, 0))
    losses = mask_loss(*pairs, config=LossConfig(points=10))
    losses.total.backward()
    assert losses.total == 0 and pairs.logits.grad is not None and (pairs.logits.grad == 0).all()
