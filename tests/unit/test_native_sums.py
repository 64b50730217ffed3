"""The native sums of the matching cost against the eager cost in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import IGNORE, Batch
from mf_scale.kernels.choose import why_not
from mf_scale.kernels.native import BLOCK, PairSums
from mf_scale.matching.cost import PairwiseCost, pairwise_cost
from mf_scale.models.outputs import Classifier, LayerPrediction, MaskPrediction
from tests.random_batches import random_batch, random_prediction

pytestmark = pytest.mark.skipif(
    why_not("native", "cpu", torch.float32) is not None,
    reason=f"no native kernels: {why_not('native', 'cpu', torch.float32)}",
)


def _cost(kernels: str, prediction: MaskPrediction, batch: Batch, ignored="negative", gamma=2.0) -> PairwiseCost:
    loss = LossConfig(ignored_pixels=ignored, focal_gamma=gamma, kernels=kernels)
    return pairwise_cost(prediction, batch, MatchingConfig(), loss)


def _double(prediction: MaskPrediction) -> MaskPrediction:
    layers = [LayerPrediction(x.class_embeddings.double(), x.mask_embeddings.double()) for x in prediction.layers()]
    last, classifier = layers[-1], Classifier(prediction.classifier.weight.double())
    classifier.bias = None if prediction.classifier.bias is None else prediction.classifier.bias.double()
    pixels = prediction.pixel_embeddings.double()
    return MaskPrediction(last.class_embeddings, last.mask_embeddings, pixels, classifier, tuple(layers[:-1]))


def _compare(prediction: MaskPrediction, batch: Batch, ignored="negative", gamma=2.0) -> None:
    got = _cost("native", prediction, batch, ignored, gamma)
    wanted = _cost("eager", _double(prediction), batch, ignored, gamma)
    real = (batch.labels >= 0)[:, None, None].expand_as(got.focal)
    for name, atol in (("class_cost", 2e-6), ("focal", 2e-6), ("dice", 2e-6), ("total", 4e-5)):  # total: 20 focal
        mine, right = getattr(got, name)[real].double(), getattr(wanted, name)[real]
        torch.testing.assert_close(mine, right, rtol=2e-5, atol=atol, msg=name)


@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("segments", [[3, 0, 5], [0, 0], [40, 3]])
@pytest.mark.parametrize("map_layers", [1, 2])
def test_matching_cost_equals_the_eager_one(ignored_pixels, gamma, segments, map_layers):
    batch = random_batch(segments, (72, 96), map_layers=map_layers)
    prediction = random_prediction(len(segments), queries=70, size=(24, 32), dtype=torch.float32)
    for term in prediction.layers():
        term.mask_embeddings.data.mul_(2)
    _compare(prediction, batch, ignored_pixels, gamma)


@given(
    cells=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    segments=st.lists(st.sampled_from([0, 1, 3, 9, 40, 300]), min_size=1, max_size=3),
    map_layers=st.integers(1, 3),
    layers=st.integers(1, 3),
    queries=st.integers(1, 130),
    ignored=st.sampled_from(["negative", "exclude"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_eager_cost(cells, size, segments, map_layers, layers, queries, ignored, seed):
    batch = random_batch(segments, size, map_layers=map_layers, seed=seed)
    prediction = random_prediction(
        len(segments), layers=layers, queries=queries, size=cells, dtype=torch.float32, seed=seed
    )
    _compare(prediction, batch, ignored)


@pytest.mark.parametrize("ignored", ["negative", "exclude"])
def test_an_index_in_another_layer_than_its_own_does_not_count(ignored):
    batch = random_batch([6], (24, 32), map_layers=3)
    batch.segment_map[0] = torch.randint(-2, 6, (3, 24, 32), generator=torch.Generator().manual_seed(0))
    assert len(batch.segment_layer.unique()) > 1
    prediction = random_prediction(1, size=(24, 32), dtype=torch.float32)
    _compare(prediction, batch, ignored)
    one = replace(batch, segment_map=batch.segment_map[:, :1])  # the only layer holds all segments
    _compare(prediction, one, ignored)


@pytest.mark.parametrize("kernels", ["native", "eager"])
@pytest.mark.parametrize("ignored", ["negative", "exclude"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_other_types_of_maps_mean_the_same(kernels, ignored, dtype):
    batch = random_batch([3, 5], map_layers=2)
    prediction = random_prediction(2, dtype=torch.float32)
    assert (batch.segment_map == IGNORE).any()
    other = replace(batch, segment_map=batch.segment_map.to(dtype))
    assert torch.equal(
        _cost(kernels, prediction, other, ignored).total, _cost(kernels, prediction, batch, ignored).total
    )


@pytest.mark.parametrize("kernels", ["native", "eager"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_at_an_ignored_pixel_is_not_hidden(kernels, value):
    batch = random_batch([2], (6, 8))
    batch.segment_map[0, 0] = 0
    batch.segment_map[0, 0, 3, 4] = IGNORE
    prediction = random_prediction(1, layers=1, queries=3, dtype=torch.float32)
    prediction.pixel_embeddings.data[0, :, 3, 4] = 0
    prediction.pixel_embeddings.data[0, 0, 3, 4] = value
    prediction.mask_embeddings.data.abs_()
    cost = _cost(kernels, prediction, batch, "exclude")
    assert not cost.focal.isfinite().any() and not cost.total.isfinite().any()


def _with_threads(count: int, work):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def test_threads_change_no_bit():
    """With embeddings of small whole numbers the product is exact however it is cut; the rest is the kernels'."""
    batch, prediction = random_batch([15], (96, 96)), random_prediction(1, queries=100, size=(96, 96))
    layers = [
        LayerPrediction(x.class_embeddings.float(), x.mask_embeddings.round().float()) for x in prediction.layers()
    ]
    pixels = prediction.pixel_embeddings.mul(4).round().div(8).float()
    classifier = Classifier(prediction.classifier.weight.float())
    last, aux = layers[-1], tuple(layers[:-1])
    rounded = MaskPrediction(last.class_embeddings, last.mask_embeddings, pixels, classifier, aux)
    costs = [_with_threads(count, lambda: _cost("native", rounded, batch)) for count in (1, 2, 3)]
    for name in ("focal", "dice", "total"):
        assert torch.equal(getattr(costs[0], name), getattr(costs[1], name)), name
        assert torch.equal(getattr(costs[0], name), getattr(costs[2], name)), name


def test_cuts_between_blocks_change_no_bit():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4 * BLOCK + 77, 130, generator=generator) * 4
    maps = torch.randint(-2, 9, (1, len(logits)), generator=generator, dtype=torch.int16)

    def sums(step: int, exclude: bool) -> list[torch.Tensor]:
        made = PairSums(130, torch.zeros(9, dtype=torch.int64), 0.25, 2.0, exclude)
        for start in range(0, len(logits), step):
            made.add(logits[start : start + step], maps, start)
        return [made.inside_focal, made.inside_mass, made.outside, made.mass]

    for exclude in (False, True):
        whole = _with_threads(1, lambda exclude=exclude: sums(len(logits), exclude))
        for step in (BLOCK, 3 * BLOCK):
            parts = _with_threads(2, lambda step=step, exclude=exclude: sums(step, exclude))
            assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_torchs_defaults_change_nothing():
    batch, prediction = random_batch([3, 2]), random_prediction(2, dtype=torch.float32)
    wanted = _cost("native", prediction, batch).total
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(_cost("native", prediction, batch).total, wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        sums = PairSums(4, torch.zeros(1, dtype=torch.int64, device="cpu"), 0.25, 2.0, False)
        assert sums.mass.device.type == "cpu"


def test_what_does_not_fit_is_refused():
    sums, maps = PairSums(4, torch.zeros(1, dtype=torch.int64), 0.25, 2.0, False), torch.zeros(1, 6, dtype=torch.int16)
    for logits, start in ((torch.zeros(3, 5), 0), (torch.zeros(3, 4), 4), (torch.zeros(3, 4), -1)):
        with pytest.raises(ValueError, match="do not fit maps"):
            sums.add(logits, maps, start)
    with pytest.raises(ValueError, match=r"take torch.int16"):
        sums.add(torch.zeros(3, 4), maps.long(), 0)
    with pytest.raises(ValueError, match=r"take torch.float32"):
        sums.add(torch.zeros(3, 4).double(), maps, 0)
