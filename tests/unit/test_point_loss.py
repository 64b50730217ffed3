"""The point-sampled loss: equal to a dense statement at its points, near the full loss, repeated by the seed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import IGNORE
from mf_scale.data.collate import cut
from mf_scale.losses import point_loss as room
from mf_scale.losses.criterion import Criterion
from mf_scale.losses.mask_loss import mask_loss
from mf_scale.losses.point_loss import point_losses
from mf_scale.losses.reference import dense_mask
from mf_scale.training import validation
from mf_scale.training.transfer import Transfer
from tests.random_batches import CLASSES, as_embeddings, part, random_batch, random_prediction

KEYS = ("a", "b")


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
    focal, dice = point_losses(logits, segment_map, segments, layers, counts, config, KEYS)
    points = room._choose_points(logits.detach(), 64, counts.tolist(), KEYS)
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
    logits = _arguments(segments=(3, 3)).logits
    points = room._choose_points(logits.detach(), 400, [3, 3], KEYS)
    values = room.sample_bilinear(logits.detach().flatten(0, 1)[:, None], points.flatten(0, 1))[:, 0].abs()
    assert values[:, :300].mean() < 0.6 * values[:, 300:].mean()
    assert points.min() >= 0 and points.max() <= 1 and points.shape == (2, 3, 400, 2)


def test_uniform_points_estimate_the_loss_of_all_pixels(monkeypatch):
    monkeypatch.setattr(room, "IMPORTANT", 0.0)
    arguments = _arguments()
    full = mask_loss(*as_embeddings(arguments.logits), *arguments[1:], config=LossConfig(), keys=KEYS)
    sampled = mask_loss(*as_embeddings(arguments.logits), *arguments[1:], config=LossConfig(points=20_000), keys=KEYS)
    torch.testing.assert_close(sampled.focal, full.focal, rtol=0.05, atol=1e-3)


def test_the_seed_of_the_micro_batch_alone_decides_the_points():
    arguments = _arguments()

    def total(seed, spent):
        torch.manual_seed(seed)
        torch.rand(spent)  # what dropout takes does not matter
        return mask_loss(
            *as_embeddings(arguments.logits), *arguments[1:], config=LossConfig(points=50), keys=KEYS
        ).total

    assert torch.equal(total(3, 0), total(3, 17)) and not torch.equal(total(3, 0), total(4, 0))


def test_gradients_reach_the_logits_of_real_pairs_only():
    pairs = _arguments(dtype=torch.float32)
    mask_loss(*as_embeddings(pairs.logits), *pairs[1:], config=LossConfig(points=100), keys=KEYS).total.backward()
    assert pairs.logits.grad is not None and pairs.logits.grad.isfinite().all()
    assert (pairs.logits.grad[1, 1:] == 0).all() and (pairs.logits.grad[0] != 0).any()


def test_no_segment_is_no_loss():
    pairs = _arguments(segments=(0, 0))
    losses = mask_loss(*as_embeddings(pairs.logits), *pairs[1:], config=LossConfig(points=10), keys=KEYS)
    losses.total.backward()
    assert losses.total == 0 and pairs.logits.grad is not None and (pairs.logits.grad == 0).all()


def test_a_batchs_points_are_those_of_its_parts():
    """Whatever the widest image of the micro-batch and the place in it."""
    pairs, config = _arguments(segments=(3, 1)), LossConfig(points=50)
    torch.manual_seed(2)
    whole = point_losses(*pairs, config, KEYS)
    for b, count in ((1, 1), (0, 3)):
        torch.manual_seed(2)
        torch.rand(b + 3)
        logits, segments, layers = (x[b : b + 1, :count] for x in (pairs.logits, pairs.segments, pairs.layers))
        one, own = pairs.segment_map[b : b + 1], pairs.counts[b : b + 1]
        alone = point_losses(logits, one, segments, layers, own, config, KEYS[b : b + 1])
        for batched, single in zip(whole, alone, strict=True):
            torch.testing.assert_close(single[0], batched[b, :count])
    torch.manual_seed(2)
    assert not torch.equal(point_losses(*pairs, config, ("a", "c"))[0][1], whole[0][1])


def _validation_sums(criterion, prediction, batch):
    engine: Any = SimpleNamespace(forward=lambda images: prediction)
    return validation._batch_sums(engine, criterion, batch, Transfer(torch.device("cpu")))


def test_the_validation_loss_does_not_depend_on_the_seed_of_training():
    criterion = Criterion(LossConfig(points=30), MatchingConfig(), CLASSES, 5)
    batch, prediction = random_batch([3, 0, 2]), random_prediction(3, dtype=torch.float32)

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(_validation_sums(criterion, prediction, batch))
    assert (found[0] == found[1]).all() and (found[0][:3] > 0).all()
    parts = [_validation_sums(criterion, part(prediction, *cuts), cut(batch, *cuts)) for cuts in ((1, 3), (0, 1))]
    np.testing.assert_allclose(parts[0] + parts[1], found[0], rtol=1e-5)
