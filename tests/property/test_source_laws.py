"""The laws of several sources and of repeats: whole shares, streams that go on, copies in systematic numbers."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_scale.data.order import SampleOrder, Stream, block_bounds, positions
from mf_scale.data.repeat import UNIT, RepeatFactors, class_factors, repeat_factors
from mf_scale.data.sources import share_batch
from mf_scale.data.state import DataState, SourcePart, leave_out, open_segment
from mf_scale.errors import UserError

FAST = settings(max_examples=60, deadline=None)
LAW: dict[str, Any] = {"seed": 1, "block_samples": 4, "shuffle": "blocks", "repeat_threshold": 0.0}
weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@FAST
@given(weights, st.integers(1, 300))
def test_shares_are_whole_and_within_one_of_the_weights(given_weights, global_batch):
    try:
        counts = share_batch(given_weights, global_batch)
    except UserError as refused:
        smallest = int(str(refused).split("one of each is ")[1].split(";")[0])
        assert min(share_batch(given_weights, smallest)) >= 1
        for size in range(max(1, smallest - 50), smallest):
            with pytest.raises(UserError):
                share_batch(given_weights, size)
        return
    assert sum(counts) == global_batch and min(counts) >= 1
    quotas = np.array(given_weights) / sum(given_weights) * global_batch
    assert (abs(np.array(counts) - quotas) < 1).all()


def test_the_smallest_global_batch_may_lie_below_the_one_that_was_asked_for():
    """The largest remainder is not monotonic: 18 gives each of these a sample, 19 does not."""
    with pytest.raises(UserError, match="holds one of each is 18"):
        share_batch([2, 0.1, 2, 0.3, 0.5], 19)


def part(name: str, samples: int, count: int) -> SourcePart:
    return SourcePart(name, name, samples, samples, count)


def taken(state: DataState, steps: range) -> dict[str, list[int]]:
    """Stream positions by source over some steps."""
    found: dict[str, list[int]] = {}
    for step in steps:
        for stream in state.at(step).streams:
            found.setdefault(stream.digest, []).extend(positions(stream, step).tolist())
    return found


changes = st.lists(
    st.tuples(st.integers(1, 12), st.dictionaries(st.sampled_from("abc"), st.integers(1, 5), min_size=1)),
    min_size=1,
    max_size=5,
)


@FAST
@given(changes)
def test_a_source_whose_law_stays_goes_on_and_none_is_read_twice(history):
    """Whatever joins, leaves, comes back or changes its share: nobody's position comes twice, the steady go on."""
    sizes = {"a": 7, "b": 30, "c": 13}
    state, step = None, 0
    numbers: dict[str, int] = {}
    for steps, counts in history:
        parts = [part(name, sizes[name], count) for name, count in counts.items()]
        before: dict[str, Stream] = {s.digest: s for s in state.at(step).streams} if state else {}
        state, _ = open_segment(state, step, parts, **LAW)
        streams = state.at(step).streams
        assert [s.source for s in streams] == sorted({s.source for s in streams})
        for stream in streams:
            assert numbers.setdefault(stream.digest, stream.source) == stream.source
            if stream.digest in before and before[stream.digest].count == counts[stream.digest]:
                assert stream == before[stream.digest]
        step += steps
    assert state is not None and len(set(numbers.values())) == len(numbers)
    for places in taken(state, range(step)).values():
        assert len(set(places)) == len(places)
    assert DataState.from_dict(state.to_dict()) == state


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"segments": []}, "has no segment"),
        ({"segments": [{"first_step": 0, "streams": []}]}, "has no segment"),
        ({"segments": [{"first_step": 0, "global_batch": 4}]}, "earlier version .*train.init_from"),
        ({"segments": [{"first_step": 0, "streams": [{"source": 0}]}]}, "cannot be read"),
        ({}, "cannot be read"),
        ({"segments": 7}, "cannot be read"),
    ],
)
def test_a_state_that_cannot_be_read_is_told_apart_from_an_old_one(saved, said):
    with pytest.raises(UserError, match=said) as caught:
        DataState.from_dict(saved, where="state.json")
    assert "state.json" in str(caught.value)


def test_the_order_in_which_sources_are_named_changes_nothing():
    first, second = part("a", 7, 2), part("b", 30, 3)
    state, _ = open_segment(None, 0, [first, second], **LAW)
    assert open_segment(state, 9, [second, first], **LAW) == (state, None)


def test_what_changes_is_said():
    state, _ = open_segment(None, 0, [part("a", 7, 2), part("b", 30, 3)], **LAW)
    state, message = open_segment(state, 5, [part("a", 7, 1), part("c", 9, 4)], **LAW)
    assert message == (
        "From step 5 the order of the data changes: a (its samples in a global batch) goes on at the start of its "
        "epoch 2, and 4 samples of the one before stay unread; c begins; the source b ends."
    )
    _, message = open_segment(state, 8, [part("a", 7, 1), part("b", 30, 4)], **LAW)
    assert (
        message and "b (its samples in a global batch) goes on at the start of its epoch 1, and 15 samples" in message
    )


def test_a_source_that_comes_back_has_not_moved_on_meanwhile():
    steady, pausing = part("a", 7, 2), part("b", 30, 3)
    state, _ = open_segment(None, 0, [steady, pausing], **LAW)
    state, _ = open_segment(state, 4, [steady], **LAW)
    state, message = open_segment(state, 40, [steady, pausing], **LAW)
    assert message and "b (it comes back) goes on at the start of its epoch 1, and 18 samples" in message
    assert min(taken(state, range(40, 41))["b"]) == 30
    assert len(state.at(40).streams) == 2 and state.at(40).streams[0] == state.at(0).streams[0]


def test_a_run_that_went_back_keeps_nothing_of_another_law_ahead():
    """Law 2, then 3 from step 5, 2 again from 9; back at step 3 with 2, it is 2 from there on."""
    first, second = [part("a", 30, 2)], [part("a", 30, 3), part("b", 9, 1)]
    state, _ = open_segment(None, 0, first, **LAW)
    state, _ = open_segment(state, 5, second, **LAW)
    state, _ = open_segment(state, 9, first, **LAW)
    back, message = open_segment(state, 3, first, **LAW)
    assert message is None and [back.at(step) for step in range(12)] == [state.at(0)] * 12
    left_out = leave_out(open_segment(None, 0, first, **LAW)[0], 6, 4)
    assert open_segment(left_out, 3, first, **LAW) == (left_out, None)  # of the same law: it stays


def test_sources_of_one_size_are_shuffled_each_in_its_own_way():
    state, _ = open_segment(None, 0, [part("a", 50, 2), part("b", 50, 2)], **LAW)
    first, second = (SampleOrder(s, [50]).sample_ids(np.arange(50)).tolist() for s in state.at(0).streams)
    assert first != second and sorted(first) == sorted(second)


@FAST
@given(st.integers(0, 15), st.integers(1, 9), st.integers(1, 9))
def test_a_range_is_left_out_of_every_source(first, count, change):
    state, _ = open_segment(None, 0, [part("a", 7, 2), part("b", 30, 3)], **LAW)
    state, _ = open_segment(state, change, [part("a", 7, 2), part("b", 30, 5), part("c", 9, 1)], **LAW)
    whole = [taken(state, range(step, step + 1)) for step in range(40)]
    del whole[first : first + count]
    shorter = leave_out(state, first, count)
    assert [taken(shorter, range(step, step + 1)) for step in range(30)] == whole[:30]


def listed(classes: list[list[int]], num_classes: int = 6) -> Any:
    """What repeats take of an index: the classes of every sample."""
    ends = np.cumsum([0, *map(len, classes)])
    flat = np.array([label for labels in classes for label in labels], np.int32)

    def lists(first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return ends[first : end + 1] - ends[first], flat[ends[first] : ends[end]]

    return SimpleNamespace(
        samples=len(classes),
        way=None,
        class_counts=lambda: np.bincount(flat, minlength=num_classes).astype(np.int64),
        class_lists=lists,
        packed_lists=lists,
    )


def stream_of(factors: RepeatFactors, samples: int, shuffle: str, block: int, count: int = 3) -> Stream:
    return Stream(0, "d", samples, factors.length, count, 5, block, shuffle, 0.5, 0, 0)


classes_of_samples = st.lists(st.lists(st.integers(0, 5), max_size=4, unique=True), min_size=1, max_size=40)


@FAST
@given(classes_of_samples, st.floats(0.01, 1), st.integers(1, 9), st.sampled_from(["blocks", "full"]))
def test_every_epoch_repeats_each_sample_by_its_factor(classes, threshold, block, shuffle):
    """Never less than once, r times on average, epochs of one length, the same copies however blocks are cut."""
    index, samples = listed(classes), len(classes)
    bounds = block_bounds([samples], block)
    factors = repeat_factors(index, threshold, bounds)
    order = SampleOrder(stream_of(factors, samples, shuffle, block), [samples], factors)
    counts = np.stack(
        [
            np.bincount(order.sample_ids(epoch * factors.length + np.arange(factors.length)), minlength=samples)
            for epoch in range(12)
        ]
    )
    wanted = np.array([_factor(index, labels, threshold) for labels in classes])
    assert (counts.sum(axis=1) == factors.length).all() and counts.min() >= 1
    added = (factors.length - wanted.sum()) / samples
    assert (abs(counts - wanted - added) < 1 + 1e-3).all()
    assert 0 <= factors.length - wanted.sum() < 1 + samples / UNIT
    whole = repeat_factors(index, threshold, np.array([0, samples]))
    assert whole.length == factors.length
    single = SampleOrder(stream_of(whole, samples, "full", samples), [samples], whole)
    assert (counts[3] == np.bincount(single.sample_ids(3 * whole.length + np.arange(whole.length)))).all()


def _factor(index: Any, labels: list[int], threshold: float) -> float:
    """The plain statement."""
    share = index.class_counts() / index.samples
    return max([1.0, *((threshold / share[label]) ** 0.5 for label in labels)])


def test_factors_are_right_on_average():
    classes = [[0]] * 90 + [[0, 1]] * 9 + [[2]]
    index = listed(classes, 3)
    factors = repeat_factors(index, 0.25, block_bounds([100], 8))
    order = SampleOrder(stream_of(factors, 100, "blocks", 8), [100], factors)
    stream = np.arange(400 * factors.length)
    mean = np.bincount(order.sample_ids(stream), minlength=100) / 400
    assert np.allclose(mean[:90], 1, atol=0.04)
    assert np.allclose(mean[90:99], (0.25 / 0.09) ** 0.5, atol=0.1) and mean[99] == pytest.approx(5, abs=0.1)
    assert class_factors(np.array([0, 1]), 100, 0.25).tolist() == [5 * UNIT, 5 * UNIT]


def test_copies_of_a_large_source_keep_to_one_part_of_memory():
    """A million samples: what is kept grows with the blocks, and one step is read from few of them."""
    samples = 1_000_000
    labels = np.where(np.arange(samples) % 1000 == 0, 1, 0).astype(np.int32)

    def lists(first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(end - first + 1), labels[first:end]

    index = SimpleNamespace(
        samples=samples,
        way=None,
        class_counts=lambda: np.bincount(labels, minlength=2).astype(np.int64),
        class_lists=lists,
        packed_lists=lists,
    )
    bounds = block_bounds([1000] * 1000, 128)
    factors = repeat_factors(index, 0.01, bounds)  # type: ignore[arg-type]
    assert (
        factors.length == samples - 1000 + int(np.ceil(1000 * (0.01 / 0.001) ** 0.5))
        or abs(factors.length - (samples + 1000 * 2.1623)) < 2
    )
    assert factors.sums.nbytes + factors.bounds.nbytes < 200_000
    order = SampleOrder(stream_of(factors, samples, "blocks", 128, count=256), [1000] * 1000, factors)
    steps = [order.sample_ids(positions(order.stream, step)) for step in range(1_000_000, 1_000_004)]
    for a, b in pairwise(steps):
        assert (np.searchsorted(bounds, a, "right") == np.searchsorted(bounds, b, "right")).mean() > 0.9
