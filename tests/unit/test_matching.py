"""Costs against the plain statement, assignments, and non-finite costs."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import NO_LABEL
from mf_scale.errors import GuardError
from mf_scale.losses.reference import matching_cost
from mf_scale.matching import cost as room
from mf_scale.matching.cost import downsample_nearest, pairwise_cost
from mf_scale.matching.hungarian import match, solve
from tests.random_batches import CLASSES, part, random_batch, random_prediction, skip_without


def _pairs(matching, layers, queries):
    """Pairs of each image and layer, as sets."""
    found = []
    for b, count in enumerate(matching.counts.tolist()):
        slots, segments = (
            (matching.slots[b, :count] - b * layers * queries).tolist(),
            matching.segments[b, :count].tolist(),
        )
        by_layer: list[set[tuple[int, int]]] = [set() for _ in range(layers)]
        for slot, segment in zip(slots, segments, strict=True):
            by_layer[slot // queries].add((slot % queries, segment))
        found.append(by_layer)
    return found


@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
@pytest.mark.parametrize("map_layers", [1, 3])
def test_costs_equal_the_plain_statement_and_assignments_are_the_cheapest(ignored_pixels, map_layers):
    loss, weights = LossConfig(ignored_pixels=ignored_pixels), MatchingConfig(class_weight=2.0)
    batch = random_batch([3, 0, 5, 8], map_layers=map_layers)
    prediction = random_prediction(4)
    cost = pairwise_cost(prediction, batch, weights, loss)
    assert not cost.total.requires_grad
    matching = match(cost, batch, "strict")
    pairs = _pairs(matching, 2, 5)
    for s, layer in enumerate(prediction.layers()):
        mask_logits = torch.einsum("bqc,bchw->bqhw", layer.mask_embeddings, prediction.pixel_embeddings)
        for b, count in enumerate((3, 0, 5, 8)):
            dense = matching_cost(
                prediction.classifier.logits(layer.class_embeddings[b]), mask_logits[b], batch, b, weights, loss
            ).detach()
            torch.testing.assert_close(cost.total[b, s, :, :count], dense)
            assert pairs[b][s] == set(zip(*(x.tolist() for x in solve(dense.numpy())), strict=True))
    assert matching.counts.tolist() == [6, 0, 10, 10] and matching.matched == 13 and matching.surplus == 3


def test_assignments_are_optimal_by_trying_all():
    from itertools import permutations

    cost = np.random.default_rng(0).random((5, 4))
    queries, segments = solve(cost)
    best = min(sum(cost[q, t] for t, q in enumerate(order)) for order in permutations(range(5), 4))
    assert cost[queries, segments].sum() == pytest.approx(best)


@pytest.mark.parametrize(("kernels", "dtype"), [("eager", torch.float64), ("native", torch.float32)])
def test_batched_equals_one_by_one(kernels, dtype):
    skip_without(kernels)
    batch, prediction, loss = random_batch([4, 1, 0, 7]), random_prediction(4, dtype=dtype), LossConfig(kernels=kernels)
    whole = match(pairwise_cost(prediction, batch, MatchingConfig(), loss), batch, "strict")
    for b in range(4):
        single = replace(
            batch,
            segment_map=batch.segment_map[b : b + 1],
            labels=batch.labels[b : b + 1],
            segment_layer=batch.segment_layer[b : b + 1],
            keys=batch.keys[b : b + 1],
        )
        cost = pairwise_cost(part(prediction, b, b + 1), single, MatchingConfig(), loss)
        assert _pairs(match(cost, single, "strict"), 2, 5) == [_pairs(whole, 2, 5)[b]]


@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
@pytest.mark.parametrize(("kernels", "dtype"), [("eager", torch.float64), ("native", torch.float32)])
def test_chunks_change_nothing(ignored_pixels, kernels, dtype, monkeypatch):
    skip_without(kernels)
    loss = LossConfig(ignored_pixels=ignored_pixels, kernels=kernels)
    batch, prediction = random_batch([4, 2]), random_prediction(2, size=(20, 30), dtype=dtype)
    whole = pairwise_cost(prediction, batch, MatchingConfig(), loss)
    monkeypatch.setitem(room._CHUNK_LOGITS, "cpu", 3 * 20 * 30)
    torch.testing.assert_close(pairwise_cost(prediction, batch, MatchingConfig(), loss).total, whole.total)


def test_the_map_is_downsampled_as_torch_does_it():
    maps = random_batch([6], (37, 50)).segment_map
    for size in [(37, 50), (10, 13), (5, 50), (37, 7)]:
        wanted = F.interpolate(maps.double(), size=size, mode="nearest").to(torch.int16)
        assert torch.equal(downsample_nearest(maps, size), wanted)


@pytest.mark.parametrize(("kernels", "dtype"), [("eager", torch.float64), ("native", torch.float32)])
def test_more_than_255_segments_and_the_last_class(kernels, dtype):
    skip_without(kernels)
    loss, prediction = LossConfig(kernels=kernels), random_prediction(1, queries=310, size=(16, 16), dtype=dtype)
    batch = random_batch([300], (64, 64))
    batch.segment_map[0, 0] = torch.arange(64 * 64).view(64, 64) // 13 % 300
    batch.labels[:] = CLASSES - 1
    cost = pairwise_cost(prediction, batch, MatchingConfig(), loss)
    for layer, terms in enumerate(prediction.layers()):
        mask_logits = torch.einsum("bqc,bchw->bqhw", terms.mask_embeddings, prediction.pixel_embeddings)
        rows = (prediction.classifier.logits(terms.class_embeddings[0, :3]), mask_logits[0, :3])
        dense = matching_cost(*rows, batch, 0, MatchingConfig(), loss).detach()
        torch.testing.assert_close(cost.total[0, layer, :3], dense, rtol=2e-5, atol=2e-6)
    matching = match(cost, batch, "strict")
    assert sorted(matching.segments[0, :300].tolist()) == list(range(300))
    probability = prediction.class_logits[0].softmax(-1)[:, CLASSES - 1]
    torch.testing.assert_close(-cost.class_cost[0, -1, :, 299], probability)


def test_a_batch_without_segments_has_one_padding_pair():
    batch = random_batch([0, 0])
    matching = match(pairwise_cost(random_prediction(2), batch, MatchingConfig(), LossConfig()), batch, "strict")
    assert matching.slots.tolist() == [[9], [19]] and matching.counts.tolist() == [0, 0]
    assert matching.segments.tolist() == matching.layers.tolist() == [[0], [0]] and (matching.labels == NO_LABEL).all()


def test_a_matching_names_label_and_map_layer_of_each_pair():
    batch = random_batch([3, 1], map_layers=3)
    matching = match(pairwise_cost(random_prediction(2), batch, MatchingConfig(), LossConfig()), batch, "strict")
    assert matching.slots.is_contiguous() and matching.segments.is_contiguous() and matching.layers.is_contiguous()
    labels = torch.full((2, 10), NO_LABEL)
    for b, count in enumerate(matching.counts.tolist()):
        segments = matching.segments[b, :count]
        labels[b, matching.slots[b, :count] - 10 * b] = batch.labels[b, segments]
        assert torch.equal(matching.layers[b, :count], batch.segment_layer[b, segments])
    assert torch.equal(matching.labels, labels) and (labels != NO_LABEL).sum() == 8


@pytest.mark.parametrize("term", ["class", "focal", "dice"])
def test_a_nonfinite_cost_is_named_and_replaced_or_stops(term, caplog):
    batch, prediction = random_batch([3, 3]), random_prediction(2)
    cost = pairwise_cost(prediction, batch, MatchingConfig(), LossConfig())
    field = "class_cost" if term == "class" else term
    values = getattr(cost, field).clone()
    values[1, 0, 2:4, 1] = torch.tensor([torch.nan, torch.inf])
    total = cost.total.clone()
    total[1, 0, 2:4, 1] = torch.nan
    spoilt = replace(cost, **{field: values}, total=total)
    with caplog.at_level(logging.WARNING):
        matching = match(spoilt, batch, "warn")
    assert matching.nonfinite == [{"layer": 0, "key": "image-1", "queries": "2-3", "term": term}]
    assert f"layer 0, image image-1, queries 2-3, {term} cost" in caplog.text
    assert not {(2, 1), (3, 1)} & _pairs(matching, 2, 5)[1][0]
    with pytest.raises(GuardError, match=f"image image-1, queries 2-3, {term} cost"):
        match(spoilt, batch, "strict")


def test_a_cost_that_is_nowhere_finite_still_gives_pairs():
    queries, segments = solve(np.full((3, 2), np.nan))
    assert len(queries) == 2 and sorted(segments.tolist()) == [0, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("large", [2e8, 3e38])
def test_a_cost_that_is_not_finite_is_above_any_other(dtype, large):
    for bad in (np.nan, np.inf, -np.inf):
        assert solve(np.array([[bad], [large]], dtype))[0].tolist() == [1]
        assert len(solve(np.array([[bad, bad], [large, 1]], dtype))[0]) == 2


@pytest.mark.parametrize("kernels", ["native", "eager"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["mask", "class", "pixel"])
@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
def test_embeddings_that_are_not_finite_are_named(kernels, bad, where, ignored_pixels, caplog):
    """From the model's answer to the message, by the kernels themselves."""
    skip_without(kernels)
    batch, prediction = random_batch([3, 3], ignored=False), random_prediction(2, dtype=torch.float32)
    with torch.no_grad():
        if where == "pixel":
            prediction.pixel_embeddings[1, 0, 2, 3] = bad
        elif where == "mask":
            prediction.aux[0].mask_embeddings[1, 2:4] = bad
        else:
            prediction.aux[0].class_embeddings[1, 2:4] = bad
    loss = LossConfig(kernels=kernels, ignored_pixels=ignored_pixels)
    cost = pairwise_cost(prediction, batch, MatchingConfig(), loss)
    with caplog.at_level(logging.WARNING):
        found = match(cost, batch, "warn").nonfinite
    places = {(place["layer"], place["key"], place["queries"], place["term"]) for place in found}
    if where == "class":
        assert places == {(0, "image-1", "2-3", "class")}
    elif where == "pixel":
        wanted = {(s, "image-1", "0-4", term) for s in (0, 1) for term in ("focal", "dice")}
        certain = {place for place in wanted if place[3] == "focal" or math.isnan(bad)}  # sigmoid(inf) is 1
        assert certain <= places <= wanted
    else:
        assert places == {(0, "image-1", "2-3", term) for term in ("focal", "dice")}
    for layer, key, queries, term in list(places)[:5]:
        assert f"layer {layer}, image {key}, queries {queries}, {term} cost" in caplog.text
    with pytest.raises(GuardError, match=r"layer 0, image image-1, queries \d-\d, \w+ cost"):
        match(cost, batch, "strict")


def test_costs_behind_the_last_segment_are_not_looked_at():
    batch, prediction = random_batch([1, 3]), random_prediction(2)
    cost = pairwise_cost(prediction, batch, MatchingConfig(), LossConfig())
    cost.total[0, :, :, 1:] = -1e9
    assert match(cost, batch, "strict").segments[0, :2].tolist() == [0, 0]
