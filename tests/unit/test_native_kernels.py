"""The C++ kernels against the eager ones in fp64, in every shape that history knows."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mf_scale.data.batch import IGNORE, NONE
from mf_scale.kernels import eager, native
from mf_scale.kernels.choose import why_not
from mf_scale.kernels.mask_loss import run
from mf_scale.kernels.settings import Settings
from tests.random_batches import random_batch

SETTINGS = Settings(focal_weight=20.0, dice_weight=1.0, alpha=0.25, gamma=2.0, exclude=False)

pytestmark = pytest.mark.skipif(
    why_not("native", "cpu", torch.float32) is not None,
    reason=f"no native kernels: {why_not('native', 'cpu', torch.float32)}",
)


class Pairs(NamedTuple):
    """What the kernels compare."""

    logits: torch.Tensor
    segment_map: torch.Tensor
    segments: torch.Tensor
    layers: torch.Tensor
    counts: torch.Tensor


def _pairs(batch, cells, pairs=None, scale=3.0, seed=0) -> Pairs:
    """Logits for every segment of the batch (or `pairs` of them) and the pairs' segments, layers and counts."""
    counts = (batch.labels >= 0).sum(1)
    P = max(1, int(counts.max())) if pairs is None else pairs
    segments = torch.arange(P).repeat(len(counts), 1).clamp(max=max(0, batch.labels.shape[1] - 1))
    layers = torch.nn.functional.pad(batch.segment_layer, (0, 1)).gather(1, segments)
    logits = torch.randn(len(counts), P, *cells, generator=torch.Generator().manual_seed(seed)) * scale
    return Pairs(logits, batch.segment_map, segments, layers, counts.clamp(max=P))


def _compare(arguments: Pairs, settings=SETTINGS):
    focal, dice, gradient = run("native", *arguments, settings=settings, want_gradient=True)
    wide = arguments._replace(logits=arguments.logits.double())
    wanted = eager.mask_loss(*wide, settings=settings, want_gradient=True)
    assert gradient is not None and wanted[2] is not None
    torch.testing.assert_close(focal.double(), wanted[0], rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(dice.double(), wanted[1], rtol=2e-6, atol=1e-7)
    biggest = wanted[2].abs().max().clamp(min=1e-30)
    assert ((gradient.double() - wanted[2]).abs().max() / biggest) < 2e-6
    bare = run("native", *arguments, settings=settings, want_gradient=False)
    assert bare[2] is None and torch.equal(bare[0], focal) and torch.equal(bare[1], dice)
    return focal, dice, gradient


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
@pytest.mark.parametrize("map_layers", [1, 2])
def test_equals_the_eager_path(exclude, gamma, map_layers):
    batch = random_batch([3, 0, 5, 9], map_layers=map_layers)
    _compare(_pairs(batch, (6, 8)), SETTINGS._replace(exclude=exclude, gamma=gamma))


@given(
    cells=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    segments=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    map_layers=st.integers(1, 3),
    exclude=st.booleans(),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_eager_path(cells, size, segments, map_layers, exclude, scale, seed):
    batch = random_batch(segments, size, map_layers=map_layers, seed=seed)
    _compare(_pairs(batch, cells, scale=scale, seed=seed), SETTINGS._replace(exclude=exclude))


def test_more_than_255_segments_a_single_pixel_and_all_ignored():
    many = random_batch([300], (40, 40))
    many.segment_map[0, 0] = torch.arange(1600).view(40, 40) // 5
    _compare(_pairs(many, (10, 10)))
    single = random_batch([2])
    single.segment_map[single.segment_map >= 0] = NONE
    single.segment_map[0, 0, 7, 9] = 1
    _compare(_pairs(single, (6, 8)))
    single.segment_map[:] = IGNORE
    for exclude in (False, True):
        _compare(_pairs(single, (6, 8)), SETTINGS._replace(exclude=exclude))


def test_padding_pairs_are_zero():
    batch = random_batch([1, 3])
    pairs = _pairs(batch, (6, 8))
    focal, dice, gradient = _compare(pairs)
    assert (focal[0, 1:] == 0).all() and (dice[0, 1:] == 0).all() and (gradient[0, 1:] == 0).all()


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_logits_keep_their_meaning(value):
    batch = random_batch([2], ignored=False)
    pairs = _pairs(batch, (6, 8))
    pairs.logits[0, 0] = value
    focal, dice, gradient = _compare(pairs)
    assert all(part.isfinite().all() for part in (focal, dice, gradient))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_pair(value):
    batch = random_batch([2])
    pairs = _pairs(batch, (6, 8))
    pairs.logits[0, 1, 2, 2] = value
    focal, dice, gradient = run("native", *pairs, settings=SETTINGS, want_gradient=True)
    assert gradient is not None and not gradient[0, 1].isfinite().all() and gradient[0, 0].isfinite().all()
    assert not focal[0, 1].isfinite() and focal[0, 0].isfinite() and dice[0, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_fp32(dtype):
    batch = random_batch([3, 2])
    pairs = _pairs(batch, (6, 8))
    half = pairs._replace(logits=pairs.logits.to(dtype))
    torch.testing.assert_close(
        run("native", *half, settings=SETTINGS, want_gradient=True),
        run("native", *half._replace(logits=half.logits.float()), settings=SETTINGS, want_gradient=True),
        rtol=0,
        atol=0,
    )


def test_threads_and_repeats_change_no_bit():
    batch = random_batch([9, 4, 7], (64, 80))
    arguments, threads = _pairs(batch, (16, 20)), torch.get_num_threads()
    try:
        answers = []
        for count in (1, 3, 1):
            torch.set_num_threads(count)
            answers.append(run("native", *arguments, settings=SETTINGS, want_gradient=True))
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("cells", "size"), [((100, 301), (1000, 1201)), ((7, 333), (1333, 1999))])
def test_positions_at_odd_ratios_are_exact(cells, size):
    """In fp32 positions alone cost 2e-5 of the gradient."""
    batch = random_batch([2], size)
    pairs = _pairs(batch, cells)
    _compare(pairs)
    narrow = eager.mask_loss(*pairs, settings=SETTINGS, want_gradient=True)[2]
    wanted = eager.mask_loss(*pairs._replace(logits=pairs.logits.double()), settings=SETTINGS, want_gradient=True)[2]
    assert narrow is not None and wanted is not None
    assert (narrow - wanted).abs().max() < 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("kernels", ["native", "eager"])
def test_torchs_defaults_change_nothing(kernels):
    pairs = _pairs(random_batch([3, 2]), (6, 8))
    wanted = run(kernels, *pairs, settings=SETTINGS, want_gradient=True)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = run(kernels, *pairs, settings=SETTINGS, want_gradient=True)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kernels", ["native", "eager"])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_other_types_of_maps_and_indices_mean_the_same(kernels, exclude, dtype):
    pairs, settings = _pairs(random_batch([3, 2], map_layers=2), (6, 8)), SETTINGS._replace(exclude=exclude)
    assert (pairs.segment_map == IGNORE).any() and (pairs.segment_map == NONE).any()
    pairs.segments[0, 0], pairs.segments[1, 0] = 253, 254  # 254 and 255 are no segments of a map of bytes
    other = pairs._replace(
        segment_map=pairs.segment_map.to(dtype),
        segments=pairs.segments.int(),
        layers=pairs.layers.int(),
        counts=pairs.counts.int(),
    )
    wanted = run(kernels, *pairs, settings=settings, want_gradient=True)
    torch.testing.assert_close(
        run(kernels, *other, settings=settings, want_gradient=True), wanted, rtol=0, atol=0, equal_nan=False
    )


@pytest.mark.parametrize("kernels", ["native", "eager"])
def test_layers_beyond_the_map_are_the_nearest_ones_and_counts_beyond_the_pairs_all(kernels):
    pairs = _pairs(random_batch([3, 2], map_layers=2), (6, 8))
    wild = pairs._replace(layers=torch.where(pairs.layers == 0, -(10**9), 10**9), counts=torch.tensor([10**9, 2]))
    wanted = run(kernels, *pairs, settings=SETTINGS, want_gradient=True)
    torch.testing.assert_close(run(kernels, *wild, settings=SETTINGS, want_gradient=True), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kernels", ["native", "eager"])
def test_what_does_not_fit_is_refused(kernels):
    pairs = _pairs(random_batch([3, 2]), (6, 8))
    for wrong in (
        {"counts": pairs.counts[:1]},
        {"segments": pairs.segments[:, :2]},
        {"layers": pairs.layers.float()},
        {"segment_map": pairs.segment_map[:1]},
        {"segment_map": pairs.segment_map[:, 0]},
        {"segment_map": pairs.segment_map[..., :0]},
    ):
        with pytest.raises(ValueError, match=r"fit together|whole numbers"):
            run(kernels, *pairs._replace(**wrong), settings=SETTINGS, want_gradient=True)
    with pytest.raises(ValueError, match=r"take torch.float32 on the cpu"):
        native.mask_loss(pairs.logits.double(), *pairs[1:], settings=SETTINGS, want_gradient=True)
