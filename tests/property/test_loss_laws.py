"""The fast loss equals the fp64 reference in value and gradient for any shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.losses.criterion import Criterion, Normalisers, target_totals
from mf_scale.losses.reference import reference_loss
from mf_scale.matching.cost import pairwise_cost
from mf_scale.matching.hungarian import match, solve
from tests.random_batches import CLASSES, leaves, random_batch, random_prediction, skip_without


def as_the_fast_path(prediction, batch, loss, matching, queries, tolerance):
    """The fast path's pairs, each checked to cost no more than the best: where assignments tie, either is right."""
    pairs = match(pairwise_cost(prediction, batch, matching, loss), batch, "strict")
    found = []
    for layer in range(len(prediction.layers())):
        for image, count in enumerate(pairs.counts.tolist()):
            slots = pairs.slots[image, :count].numpy() - image * len(prediction.layers()) * queries
            segments = pairs.segments[image, :count].numpy()
            here = slots // queries == layer
            found.append((slots[here] % queries, segments[here]))

    def assign(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = found.pop(0)
        assert len(chosen[0]) == min(cost.shape)
        np.testing.assert_allclose(cost[chosen].sum(), cost[solve(cost)].sum(), rtol=tolerance, atol=tolerance)
        return chosen

    return assign


SHAPES = st.fixed_dictionaries(
    {
        "segments": st.lists(st.integers(0, 6), min_size=1, max_size=3),
        "queries": st.integers(1, 5),
        "layers": st.integers(1, 3),
        "map_layers": st.integers(1, 3),
        "map_size": st.tuples(st.integers(1, 20), st.integers(1, 20)),
        "size": st.tuples(st.integers(1, 7), st.integers(1, 7)),
        "ignored_pixels": st.sampled_from(["negative", "exclude"]),
        "gamma": st.sampled_from([0.0, 1.0, 2.0, 3.5]),
        "alpha": st.floats(0, 1),
        "seed": st.integers(0, 1000),
    }
)


def check_against_the_plain_loss(shape: dict[str, Any], kernels: str, dtype: torch.dtype, tolerance: float) -> None:
    """The kernels' loss in `dtype` and the plain one in fp64, of the same numbers."""
    segments, queries = shape["segments"], shape["queries"]
    loss = LossConfig(
        ignored_pixels=shape["ignored_pixels"],
        focal_gamma=shape["gamma"],
        focal_alpha=shape["alpha"],
        kernels=kernels,
    )
    matching = MatchingConfig(nonfinite="strict")
    batch = random_batch(segments, shape["map_size"], map_layers=shape["map_layers"], seed=shape["seed"])
    sizes = {"layers": shape["layers"], "queries": queries, "size": shape["size"], "seed": shape["seed"]}
    prediction = random_prediction(len(segments), **sizes, dtype=dtype)
    exact = random_prediction(len(segments), **sizes)
    with torch.no_grad():
        for wide, own in zip(leaves(exact), leaves(prediction), strict=True):
            wide.copy_(own)
    masks, weight = target_totals(batch, queries, loss.no_object_weight)
    assign = as_the_fast_path(prediction, batch, loss, matching, queries, tolerance)
    plain = reference_loss(exact, batch, masks, weight, loss, matching, assign)
    fast = Criterion(loss, matching, CLASSES, queries)(prediction, batch, Normalisers(masks, weight))
    near: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    for name, value in plain.items():
        torch.testing.assert_close(fast.terms[name], value.detach(), **near)
    wanted = torch.autograd.grad(torch.stack([*plain.values()]).sum(), leaves(exact), materialize_grads=True)
    got = torch.autograd.grad(fast.total, leaves(prediction))
    torch.testing.assert_close(got, wanted, **near)


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_fast_equals_plain(shape):
    check_against_the_plain_loss(shape, "eager", torch.float64, 1e-9)


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_native_in_fp32_equals_plain(shape):
    skip_without("native")
    check_against_the_plain_loss(shape, "native", torch.float32, 2e-5)
