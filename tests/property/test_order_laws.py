"""The laws of the order: every sample once an epoch, the same global batches for every layout and every cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_scale.data.order import (
    SampleOrder,
    Segment,
    Stream,
    block_bounds,
    epochs_begun,
    positions,
    rank_lanes,
    window,
    worker_share,
)
from mf_scale.data.permutation import key, permute, permute_all
from mf_scale.data.state import DataState, SourcePart, leave_out, open_segment

shards = st.lists(st.integers(1, 40), min_size=1, max_size=6)
batches = st.integers(1, 48)
shuffles = st.sampled_from(["blocks", "full"])
FAST = settings(max_examples=60, deadline=None)


def segment(shard_samples, global_batch, block, shuffle, seed=0, first_step=0, first_epoch=0) -> Stream:
    samples = sum(shard_samples)
    return Stream(0, "digest", samples, samples, global_batch, seed, block, shuffle, 0.0, first_step, first_epoch)


def state_of(*streams: Stream) -> DataState:
    return DataState((Segment(streams[0].origin, streams),))


def only(state: DataState, step: int) -> Stream:
    """The stream of a state with one source."""
    (stream,) = state.at(step).streams
    return stream


def steps_of(law: Stream, epochs: int) -> range:
    """The steps that cover the first epochs of a stream."""
    return range(law.origin, law.origin + -(-epochs * law.length // law.count))


@FAST
@given(shards, batches, st.integers(1, 50), shuffles, st.integers(-5, 2**40), st.integers(0, 9), st.integers(0, 1000))
def test_every_sample_once_an_epoch(shard_samples, global_batch, block, shuffle, seed, first_epoch, first_step):
    law = segment(shard_samples, global_batch, block, shuffle, seed, first_step, first_epoch)
    order = SampleOrder(law, shard_samples)
    for epoch in (first_epoch, first_epoch + 1):
        stream = epoch * law.samples + np.arange(law.samples)
        assert sorted(order.sample_ids(stream)) == list(range(law.samples))
    read = np.sort(np.concatenate([positions(law, step) for step in steps_of(law, 3)]))
    start = first_epoch * law.samples
    stop = start + global_batch * (3 * law.samples // global_batch)
    assert (read[: stop - start] == np.arange(start, stop)).all()
    assert len(np.unique(read)) == len(read)


@FAST
@given(shards, batches, st.integers(0, 200))
def test_a_lane_is_read_front_to_back(shard_samples, global_batch, step):
    law = segment(shard_samples, global_batch, 8, "blocks")
    start, steps, number = window(law, step)
    assert 0 <= number < steps
    assert (positions(law, step) == start + np.arange(global_batch) * steps + number).all()
    if number + 1 < steps:
        assert (positions(law, step + 1) == positions(law, step) + 1).all()
    else:
        assert window(law, step + 1)[0] == start + global_batch * steps


@FAST
@given(batches, st.integers(1, 8), st.integers(0, 8), st.integers(0, 30))
def test_ranks_and_workers_share_the_lanes(per_rank, world, workers, first_step):
    global_batch = per_rank * world
    seen: dict[int, list[int]] = {}
    for rank in range(world):
        lanes = rank_lanes(global_batch, rank, world)
        shares = [worker_share(lanes, w, max(workers, 1)) for w in range(max(workers, 1))]
        for step in range(first_step, first_step + 10):
            makers = [
                s for s in shares if (step - first_step - s.first) % s.stride == 0 and step >= first_step + s.first
            ]
            assert [lane for share in makers for lane in share.lanes] == list(lanes)
            seen.setdefault(step, []).extend(lanes)
    assert all(sorted(lanes) == list(range(global_batch)) for lanes in seen.values())


def test_a_world_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="does not divide"):
        rank_lanes(10, 0, 4)


@FAST
@given(shards, batches, shuffles, st.integers(0, 99), st.integers(0, 30), st.data())
def test_a_resume_cut_changes_nothing(shard_samples, global_batch, shuffle, seed, cut, data):
    law = segment(shard_samples, global_batch, 16, shuffle, seed)
    whole = [SampleOrder(law, shard_samples).sample_ids(positions(law, step)).tolist() for step in range(cut + 3)]
    state = DataState.from_dict(state_of(law).to_dict())
    resumed, message = reopen(state, cut)
    assert resumed is state and message is None
    order = SampleOrder(only(resumed, cut), shard_samples)
    step = data.draw(st.integers(cut, cut + 2))
    assert order.sample_ids(positions(only(resumed, step), step)).tolist() == whole[step]


@FAST
@given(shards, batches, batches, st.integers(0, 60))
def test_a_changed_batch_goes_on_at_the_next_epoch(shard_samples, before, after, cut):
    law = segment(shard_samples, before, 16, "blocks", first_epoch=2)
    state, message = reopen(state_of(law), cut, count=after)
    if before == after:
        assert message is None
        return
    new = only(state, cut)
    assert state.segments[0].streams == (law,) and only(state, cut - 1 if cut else 0) in (law, new)
    read = {int(p) for step in range(cut) for p in positions(law, step)}
    start = new.first_epoch * new.length
    assert all(p < start for p in read)
    assert not read or max(read) >= start - new.samples
    unread = start - 2 * new.samples - len(read)
    assert f" {unread} samples" in message and "global batch" in message
    assert positions(new, cut).min() == start
    assert epochs_begun(law, cut) == new.first_epoch - 2


def part_of(stream: Stream, **changes) -> SourcePart:
    facts = {name: getattr(stream, name) for name in ("digest", "samples", "length", "count")}
    return SourcePart(**{"name": stream.digest, **facts, **changes})


def reopen(state: DataState, step: int, **changes):
    """The state at `step` of a run whose one source has other samples in a global batch, or whatever is changed."""
    last = state.segments[-1].streams[-1]
    names = ("seed", "block_samples", "shuffle", "repeat_threshold")
    laws = {name: changes.pop(name, getattr(last, name)) for name in names}
    return open_segment(state, step, [part_of(last, **changes)], **laws)


ranges = st.lists(st.tuples(st.integers(0, 25), st.integers(1, 12)), min_size=1, max_size=3)


@FAST
@given(shards, batches, shuffles, st.integers(0, 9), ranges)
def test_leaving_out_a_range_leaves_the_rest_as_it_was(shard_samples, global_batch, shuffle, first_epoch, left_out):
    """Also ranges behind, before and across ranges that were left out earlier."""
    law = segment(shard_samples, global_batch, 16, shuffle, first_step=3, first_epoch=first_epoch)
    state, expected = state_of(law), list(range(3, 80))
    for after, count in left_out:
        first = 3 + after
        state = leave_out(state, first, count)
        del expected[after : after + count]
    assert DataState.from_dict(state.to_dict()) == state
    order = SampleOrder(law, shard_samples)
    for step, undisturbed in enumerate(expected[:40], start=3):
        wanted = positions(law, undisturbed)
        assert (positions(only(state, step), step) == wanted).all(), (step, undisturbed)
        same = SampleOrder(only(state, step), shard_samples).sample_ids(wanted)
        assert (same == order.sample_ids(wanted)).all()


@FAST
@given(shards, batches, batches, st.integers(0, 20), st.integers(1, 12), st.integers(0, 30))
def test_a_changed_batch_after_or_before_a_range_left_out(shard_samples, before, after, first, count, cut):
    """The new order begins behind everything that was read, and a range that was still to be left out goes."""
    if before == after:
        return
    gone_back = leave_out(state_of(segment(shard_samples, before, 16, "blocks")), first, count)
    state, message = reopen(gone_back, cut, count=after)
    new = only(state, cut)
    assert all(only(state, cut + more) is new for more in range(50))
    assert [s.first_step for s in state.segments] == sorted(s.first_step for s in state.segments)
    read = [int(p) for step in range(cut) for p in positions(only(gone_back, step), step)]
    start = new.first_epoch * new.length
    passed = len(read) + (count * before if cut >= first else 0)
    assert positions(new, cut).min() == start and all(p < start for p in read)
    assert f" {start - passed} samples" in message and start - passed < new.samples


@FAST
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_a_permutation_is_one(size, key):
    keys = np.array([key], np.uint64)
    assert sorted(permute(np.arange(size), size, keys)) == list(range(size))


def test_permutations_are_even():
    """Each of 7 values comes to each place about equally often over 7000 keys."""
    places = permute(np.arange(7)[:, None], 7, np.arange(7000, dtype=np.uint64)[None])
    counts = np.stack([np.bincount(row, minlength=7) for row in places])
    assert abs(counts - 1000).max() < 150


def test_epochs_and_seeds_differ():
    orders = []
    for seed in (0, 1):
        law = segment([50, 50], 8, 10, "blocks", seed)
        order = SampleOrder(law, [50, 50])
        orders += [tuple(order.sample_ids(epoch * 100 + np.arange(100))) for epoch in range(3)]
    assert len(set(orders)) == 6


@FAST
@given(shards, st.integers(1, 50))
def test_blocks_stay_inside_shards_and_under_their_size(shard_samples, block):
    bounds = block_bounds(shard_samples, block)
    assert set(np.cumsum([0, *shard_samples])) <= set(bounds.tolist())
    assert np.diff(bounds).min() >= 1 and np.diff(bounds).max() <= block


@pytest.mark.parametrize("global_batch", [16, 64])
def test_a_sorted_source_is_mixed_nearly_as_well_by_blocks(global_batch):
    """Of a source sorted by class, the samples of a batch and of 256 steps hold the classes nearly as `full` does."""
    shard_samples = [1000] * 40
    classes = np.arange(40_000) // 4000

    def spread(shuffle: str, steps: int) -> float:
        law = segment(shard_samples, global_batch, 64, shuffle, 3)
        order = SampleOrder(law, shard_samples)
        out = []
        for first in range(0, 512, steps):
            ids = np.concatenate([order.sample_ids(positions(law, s)) for s in range(first, first + steps)])
            share = np.bincount(classes[ids], minlength=10) / len(ids)
            out.append(((share - 0.1) ** 2).sum())
        return float(np.mean(out))

    assert spread("blocks", 1) < 1.25 * spread("full", 1)
    assert spread("blocks", 256) < 0.03


@FAST
@given(size=st.one_of(st.integers(1, 70), st.integers(1, 70_000)), seed=st.integers(0, 2**40), epoch=st.integers(0, 99))
def test_the_whole_permutation_is_that_of_its_elements(size: int, seed: int, epoch: int) -> None:
    made = permute_all(size, key(seed, epoch, 0))
    assert made.dtype == np.int32 and np.array_equal(made, permute(np.arange(size), size, key(seed, epoch, 0)))
