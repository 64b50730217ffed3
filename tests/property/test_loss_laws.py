"""The fast loss equals the fp64 reference in value and gradient for any shapes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.losses.criterion import Criterion, Normalisers, target_totals
from mf_scale.losses.reference import reference_loss
from mf_scale.matching.cost import pairwise_cost
from mf_scale.matching.hungarian import match, solve
from tests.random_batches import CLASSES, leaves, random_batch, random_prediction


def as_the_fast_path(prediction, batch, loss, matching, queries):
    """The fast path's pairs, each checked to cost no more than the best: where assignments tie, either is right."""
    pairs = match(pairwise_cost(prediction, batch, matching, loss), batch, "strict")
    found = []
    for layer in range(len(prediction.layers())):
        for image, count in enumerate(pairs.counts.tolist()):
            slots, segments = pairs.slots[image, :count].numpy(), pairs.segments[image, :count].numpy()
            here = slots // queries == layer
            found.append((slots[here] % queries, segments[here]))

    def assign(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = found.pop(0)
        assert len(chosen[0]) == min(cost.shape)
        np.testing.assert_allclose(cost[chosen].sum(), cost[solve(cost)].sum(), rtol=1e-9, atol=1e-9)
        return chosen

    return assign


@settings(max_examples=40, deadline=None)
@given(
    segments=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    queries=st.integers(1, 5),
    layers=st.integers(1, 3),
    map_layers=st.integers(1, 3),
    map_size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    ignored_pixels=st.sampled_from(["negative", "exclude"]),
    gamma=st.sampled_from([0.0, 1.0, 2.0, 3.5]),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_fast_equals_plain(segments, queries, layers, map_layers, map_size, size, ignored_pixels, gamma, alpha, seed):
    loss = LossConfig(ignored_pixels=ignored_pixels, focal_gamma=gamma, focal_alpha=alpha)
    matching = MatchingConfig(nonfinite="strict")
    batch = random_batch(segments, map_size, map_layers=map_layers, seed=seed)
    prediction = random_prediction(len(segments), layers=layers, queries=queries, size=size, seed=seed)
    masks, weight = target_totals(batch, queries, loss.no_object_weight)
    assign = as_the_fast_path(prediction, batch, loss, matching, queries)
    plain = reference_loss(prediction, batch, masks, weight, loss, matching, assign)
    fast = Criterion(loss, matching, CLASSES, queries)(prediction, batch, Normalisers(masks, weight))
    for name, value in plain.items():
        torch.testing.assert_close(fast.terms[name], value.detach(), rtol=1e-9, atol=1e-9)
    inputs = leaves(prediction)
    wanted = torch.autograd.grad(torch.stack([*plain.values()]).sum(), inputs, materialize_grads=True)
    got = torch.autograd.grad(fast.total, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)
