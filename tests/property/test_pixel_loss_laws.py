"""The fast per-pixel loss equals the fp64 reference in value and gradient for any shapes and bands."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_scale.data.batch import NOT_EXHAUSTIVE, UNKNOWN
from mf_scale.losses import pixel_loss as room
from mf_scale.losses.pixel_criterion import PixelCriterion
from mf_scale.losses.reference import reference_pixel_loss
from tests.random_batches import CLASSES, pixel_leaves, random_batch, random_pixel_prediction


@settings(max_examples=60, deadline=None)
@given(
    segments=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    layers=st.integers(1, 3),
    map_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    bias=st.booleans(),
    unknown=st.sampled_from(["nothing said", "none", "some", "all but one", "all"]),
    band=st.integers(1, 2000),
    seed=st.integers(0, 1000),
)
def test_fast_equals_plain(segments, layers, map_size, size, bias, unknown, band, seed):
    batch = replace(random_batch(segments, map_size, seed=seed), class_mask=_mask(unknown, len(segments), seed))
    prediction = random_pixel_prediction(len(segments), layers=layers, size=size, bias=bias, seed=seed)
    criterion = PixelCriterion()
    normalisers = criterion.normalisers(criterion.totals(batch))
    with mock.patch.dict(room._BAND_ELEMENTS, cpu=band):
        fast = criterion(prediction, batch, normalisers)
    plain = reference_pixel_loss(prediction, batch, normalisers)
    torch.testing.assert_close(fast.total, plain, rtol=1e-9, atol=1e-12)
    inputs = pixel_leaves(prediction)
    wanted = torch.autograd.grad(plain, inputs, materialize_grads=True) if plain.requires_grad else None
    got = torch.autograd.grad(fast.total, inputs)
    for mine, theirs in zip(got, wanted or [torch.zeros_like(t) for t in inputs], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


def _mask(unknown: str, images: int, seed: int) -> torch.Tensor | None:
    if unknown == "nothing said":
        return None
    mask = torch.zeros(images, CLASSES, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    if unknown == "some":
        mask = torch.randint(0, 3, mask.shape, dtype=torch.uint8, generator=generator)
    elif unknown != "none":
        mask[:] = UNKNOWN
    if unknown == "all but one":
        one = torch.randint(0, CLASSES, (images, 1), generator=generator)
        mask.scatter_(1, one, NOT_EXHAUSTIVE if seed % 2 else 0)
    return mask
