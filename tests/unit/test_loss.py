"""The criterion against the plain statement, and every case that history knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import IGNORE, NO_LABEL, NONE
from mf_scale.kernels import eager as room
from mf_scale.losses.criterion import Criterion, Normalisers, target_totals
from mf_scale.losses.mask_loss import mask_loss
from mf_scale.losses.reference import reference_loss
from mf_scale.matching.cost import pairwise_cost
from mf_scale.matching.hungarian import match
from mf_scale.models.outputs import Classifier
from tests.random_batches import CLASSES, as_embeddings, leaves, part, random_batch, random_prediction


def _criterion(ignored_pixels: str = "negative") -> Criterion:
    return Criterion(LossConfig(ignored_pixels=ignored_pixels), MatchingConfig(nonfinite="strict"), CLASSES, 5)


def _gradients(total, prediction):
    return torch.autograd.grad(total, leaves(prediction), allow_unused=True)


def _check_against_reference(prediction, batch, ignored_pixels="negative"):
    criterion, queries = _criterion(ignored_pixels), prediction.class_embeddings.shape[1]
    normalisers = Normalisers(*target_totals(batch, queries, 0.1))
    got = criterion(prediction, batch, normalisers)
    wanted = reference_loss(
        prediction, batch, normalisers.num_masks, normalisers.class_weight, criterion.loss, criterion.matching
    )
    for name, value in wanted.items():
        torch.testing.assert_close(got.terms[name], value.detach(), msg=name)
    total = sum(wanted.values())
    torch.testing.assert_close(got.total, total)
    torch.testing.assert_close(sum(got.terms.values()), got.total.detach())
    for mine, theirs in zip(_gradients(got.total, prediction), _gradients(total, prediction), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)
    return got


@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
@pytest.mark.parametrize("map_layers", [1, 2])
def test_equals_the_reference_in_value_and_gradient(ignored_pixels, map_layers):
    batch = random_batch([3, 0, 5, 9], map_layers=map_layers)
    got = _check_against_reference(random_prediction(4), batch, ignored_pixels)
    assert got.counts == {"matched": 13, "surplus": 4}


@pytest.mark.parametrize("points", [0, 20])
def test_terms_by_layer_are_those_of_a_prediction_of_that_layer_alone(points):
    """With an image without segments, one with more than queries, and rows of pairs of different lengths."""
    batch, prediction = random_batch([3, 0, 9]), random_prediction(3, layers=3)
    criterion, normalisers = _criterion(), Normalisers(*target_totals(batch, 5, 0.1))
    criterion.loss.points = points
    torch.manual_seed(1)
    got = criterion(prediction, batch, normalisers)
    for name, layers in got.layers.items():
        assert layers.shape == (3,) and not layers.requires_grad
        torch.testing.assert_close(layers.sum(), got.terms[name])
    if points:
        return  # which points are drawn depends on the pairs of all layers
    for number, layer in enumerate(prediction.layers()):
        alone = replace(prediction, **vars(layer), aux=())
        for name, term in criterion(alone, batch, normalisers).terms.items():
            torch.testing.assert_close(got.layers[name][number], term, msg=f"{name} of layer {number}")


def test_the_class_loss_is_torchs_cross_entropy():
    logits = torch.randn(2, 3, 5, CLASSES + 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch, prediction = random_batch([3, 5]), random_prediction(2, layers=3, dtype=torch.float32)
    criterion = _criterion()
    pairs = match(pairwise_cost(prediction, batch, criterion.matching, criterion.loss), batch, "strict")
    total, layers = criterion._class_loss(logits, Classifier(torch.eye(CLASSES + 1)), pairs, 0.3, batch)
    weight = torch.full((CLASSES + 1,), 0.3)
    weight[-1] = 0.3 * criterion.loss.no_object_weight
    targets = pairs.labels.flatten().remainder(CLASSES + 1)
    wanted = F.cross_entropy(logits.flatten(0, 2), targets, weight, reduction="sum")
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(layers.sum(), wanted.detach(), rtol=1e-6, atol=0)
    got, right = (torch.autograd.grad(value, logits)[0] for value in (total, wanted))
    torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-7)


def test_no_segment_gives_class_loss_and_exactly_no_mask_loss():
    batch, prediction = random_batch([0, 0]), random_prediction(2)
    got = _criterion()(prediction, batch, Normalisers(*target_totals(batch, 5, 0.1)))
    assert got.terms["class"] > 0 and got.terms["focal"] == 0 and got.terms["dice"] == 0
    gradients = _gradients(got.total, prediction)
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert (gradients[-1] == 0).all()


@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
def test_all_pixels_ignored(ignored_pixels):
    batch = random_batch([2])
    batch.segment_map[:] = IGNORE
    _check_against_reference(random_prediction(1), batch, ignored_pixels)


@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
def test_a_single_pixel_and_a_vanished_segment(ignored_pixels):
    batch = random_batch([2], ignored=True)
    batch.segment_map[batch.segment_map >= 0] = NONE
    batch.segment_map[0, 0, 7, 9] = 0
    _check_against_reference(random_prediction(1), batch, ignored_pixels)


def test_ignored_pixels_leave_the_loss_only_under_exclude():
    batch, prediction = random_batch([3]), random_prediction(1)
    ignored = batch.segment_map == IGNORE
    assert ignored.any()
    emptied = replace(batch, segment_map=torch.where(ignored, NONE, batch.segment_map))
    losses = {
        (mode, kind): float(_criterion(mode)(prediction, b, Normalisers(3, 3.2)).total.detach())
        for mode in ("negative", "exclude")
        for kind, b in (("ignored", batch), ("none", emptied))
    }
    assert losses["negative", "ignored"] == losses["negative", "none"] == losses["exclude", "none"]
    assert losses["exclude", "ignored"] != losses["negative", "ignored"]


@pytest.mark.parametrize("map_size", [(24, 32), (6, 8), (25, 31), (3, 5), (64, 9)])
def test_any_ratio_of_map_to_prediction(map_size):
    _check_against_reference(random_prediction(2), random_batch([2, 3], map_size))


def test_the_last_class_and_many_segments():
    batch = random_batch([260], (40, 40))
    batch.labels[0, ::2] = CLASSES - 1
    batch.segment_map[0, 0] = torch.arange(1600).view(40, 40) // 6
    batch.segment_map[batch.segment_map >= 260] = NONE
    got = _criterion()(random_prediction(1, queries=270), batch, Normalisers(260, 261))
    assert got.counts["matched"] == 260 and got.total.isfinite()
    _check_against_reference(random_prediction(1, layers=1, queries=3), batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_computed_in_fp32(dtype):
    batch, half = random_batch([3, 2]), random_prediction(2, dtype=dtype)
    full = random_prediction(2)
    with torch.no_grad():
        for mine, theirs in zip(leaves(full), leaves(half), strict=True):
            mine.copy_(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        got = _criterion()(half, batch, Normalisers(5, 5.5))
    assert got.total.dtype == torch.float32
    torch.testing.assert_close(
        got.total.double(), _criterion()(full, batch, Normalisers(5, 5.5)).total, rtol=1e-5, atol=0
    )
    assert all(g.dtype == dtype and g.isfinite().all() for g in _gradients(got.total, half))


def test_large_logits_stay_finite():
    batch, prediction = random_batch([3]), random_prediction(1, dtype=torch.float32)
    with torch.no_grad():
        prediction.pixel_embeddings.mul_(1e4)
    got = _criterion()(prediction, batch, Normalisers(3, 3.2))
    assert got.total.isfinite() and all(g.isfinite().all() for g in _gradients(got.total, prediction))


@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
def test_gradcheck(ignored_pixels, gamma):
    batch = random_batch([3], (9, 11), map_layers=2)
    generator = torch.Generator().manual_seed(0)
    embeddings = [
        torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in ((1, 3, 2), (1, 2, 4, 5))
    ]
    config = LossConfig(ignored_pixels=ignored_pixels, focal_gamma=gamma)
    segments = torch.tensor([[2, 0, 1]])
    layers = batch.segment_layer.gather(1, segments)
    count = torch.tensor([3])

    def total(masks, pixels):
        return mask_loss(masks, pixels, batch.segment_map, segments, layers, count, config, batch.keys).total

    assert gradcheck(total, embeddings)


def test_padding_pairs_cost_nothing_and_pull_at_nothing():
    batch = random_batch([1, 3])
    logits = torch.randn(2, 3, 6, 8, dtype=torch.float64).requires_grad_()
    segments, layers = torch.tensor([[0, 3, 3], [0, 1, 2]]), torch.zeros(2, 3, dtype=torch.int64)
    counts, config = torch.tensor([1, 3]), LossConfig()
    losses = mask_loss(*as_embeddings(logits), batch.segment_map, segments, layers, counts, config, batch.keys)
    (gradient,) = torch.autograd.grad(losses.total, logits)
    assert (losses.focal[0, 1:] == 0).all() and (losses.dice[0, 1:] == 0).all() and (losses.focal[1] > 0).all()
    assert (gradient[0, 1:] == 0).all() and (gradient[1] != 0).any()


def test_chunks_change_nothing(monkeypatch):
    batch, prediction = random_batch([6, 4], map_layers=2), random_prediction(2)
    whole = _criterion()(prediction, batch, Normalisers(10, 10))
    expected = _gradients(whole.total, prediction)
    monkeypatch.setitem(room._CHUNK_PIXELS, "cpu", 2 * 24 * 32)
    pieces = _criterion()(prediction, batch, Normalisers(10, 10))
    torch.testing.assert_close(pieces.total, whole.total)
    torch.testing.assert_close(_gradients(pieces.total, prediction), expected)


def test_nothing_of_full_resolution_is_kept_for_backward():
    batch, prediction = random_batch([8], (96, 128)), random_prediction(1, queries=8, size=(24, 32))
    kept: list[int] = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _criterion()(prediction, batch, Normalisers(8, 8)).total.backward()
    pairs = 2 * 8
    assert max(kept) <= pairs * 24 * 32 < pairs * 96 * 128


def test_without_gradients_none_is_made():
    batch, prediction = random_batch([3]), random_prediction(1)
    with torch.no_grad():
        silent = _criterion()(prediction, batch, Normalisers(3, 3.2))
    assert not silent.total.requires_grad
    assert silent.total == _criterion()(prediction, batch, Normalisers(3, 3.2)).total


@pytest.mark.parametrize("parts", [[(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 2), (2, 4)], [(0, 3), (3, 4)]])
def test_a_batch_of_four_equals_its_parts_under_shared_normalisers(parts):
    batch, prediction = random_batch([2, 0, 7, 4]), random_prediction(4)
    cuts = [
        replace(
            batch,
            images=batch.images[a:b],
            segment_map=batch.segment_map[a:b],
            labels=batch.labels[a:b],
            segment_layer=batch.segment_layer[a:b],
            keys=batch.keys[a:b],
        )
        for a, b in parts
    ]
    totals = [target_totals(piece, 5, 0.1) for piece in cuts]
    normalisers = Normalisers(*(sum(column) for column in zip(*totals, strict=True)))
    assert (normalisers.num_masks, normalisers.class_weight) == pytest.approx(target_totals(batch, 5, 0.1))
    whole = _criterion()(prediction, batch, normalisers)
    pieces = [
        _criterion()(part(prediction, a, b), piece, normalisers) for (a, b), piece in zip(parts, cuts, strict=True)
    ]
    total = torch.stack([p.total for p in pieces]).sum()
    torch.testing.assert_close(total, whole.total)
    torch.testing.assert_close(_gradients(total, prediction), _gradients(whole.total, prediction))


def test_target_totals_count_surplus_segments_as_masks_only():
    batch = random_batch([2, 0, 7])
    assert (batch.labels == NO_LABEL).sum() == 12
    masks, weight = target_totals(batch, 5, 0.1)
    assert masks == 9 and weight == pytest.approx(2 + 0.3 + 0.5 + 5)


def test_equal_inputs_give_equal_bits():
    batch, prediction = random_batch([5, 9], (64, 64)), random_prediction(2, dtype=torch.float32)
    first, second = (_criterion()(prediction, batch, Normalisers(14, 10)) for _ in range(2))
    assert torch.equal(first.total, second.total)
    assert all(map(torch.equal, _gradients(first.total, prediction), _gradients(second.total, prediction)))


def test_descent_finds_the_segments():
    """The loss is a loss: free embeddings learn to draw the map and to name its classes."""
    batch = random_batch([3], (32, 32), ignored=False)
    prediction = random_prediction(1, layers=1, size=(8, 8), channels=8, dtype=torch.float32)
    optimizer = torch.optim.Adam(leaves(prediction), 0.05)
    history = []
    for _ in range(150):
        terms = _criterion()(prediction, batch, Normalisers(*target_totals(batch, 5, 0.1)))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        history.append(float(terms.total.detach()))
    assert history[-1] < 0.15 * history[0]
