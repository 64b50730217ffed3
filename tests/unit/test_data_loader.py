"""The training stream: one order for every layout, with real worker processes, faults and quarantine."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from mf_scale.config.schema import SourceConfig
from mf_scale.data.batch import IGNORE, NO_LABEL
from mf_scale.data.collate import join
from mf_scale.data.index import HEAD, head_digest
from mf_scale.data.loader import RankStream, eval_samples, loss_batches, train_steps
from mf_scale.data.order import SampleOrder, positions
from mf_scale.data.places import Places
from mf_scale.data.sources import open_training, order_of
from mf_scale.data.state import leave_out
from mf_scale.data.storage import Storage
from mf_scale.errors import GuardError, UserError
from tests.sources import make_source, open_state, small_config

TENSORS = ("images", "segment_map", "labels", "segment_layer")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), [9, 6, 8])


def steps(index, config, count, *, global_batch=4, rank=0, world=1, step=0, seed=5, state=None):
    state = state or open_state(index, config, global_batch, seed)
    stream = train_steps([index], state, config, rank=rank, world=world, step=step)
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


def over_ranks(index, config, count, *, global_batch=4, world=1, step=0, state=None):
    """(step, global batch in lane order) from all ranks."""
    ranks = [
        steps(index, config, count, global_batch=global_batch, rank=r, world=world, step=step, state=state)
        for r in range(world)
    ]
    out = []
    for parts in zip(*ranks, strict=True):
        assert len({number for number, _ in parts}) == 1
        order = np.argsort(np.concatenate([np.arange(r, global_batch, world) for r in range(world)]))
        out.append((parts[0][0], join([part for _, part in parts]), order))
    return out


def assert_same(left, right):
    for (step, batch, order), (other_step, other, other_order) in zip(left, right, strict=True):
        assert step == other_step
        assert [batch.keys[i] for i in order] == [other.keys[i] for i in other_order]
        for name in TENSORS:
            assert torch.equal(getattr(batch, name)[order], getattr(other, name)[other_order]), name


@pytest.mark.parametrize("shuffle", ["blocks", "full"])
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 0), (2, 3), (4, 2)])
def test_the_same_global_batches_for_every_layout(index, world, workers, shuffle):
    alone = over_ranks(index, small_config(shuffle=shuffle), 13)
    shared = over_ranks(index, small_config(shuffle=shuffle, workers=workers), 13, world=world)
    assert_same(alone, shared)


def test_a_resume_at_any_step_goes_on_as_the_uninterrupted_run(index):
    whole = over_ranks(index, small_config(), 14)
    for cut, workers in ((1, 0), (6, 2), (11, 0)):
        resumed = over_ranks(index, small_config(workers=workers), 14 - cut, world=2, step=cut)
        assert_same(whole[cut:], resumed)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 3), (4, 2)])
def test_a_range_that_is_left_out_ahead_is_missing_from_the_stream_and_nothing_else(index, world, workers):
    """A run that went back to step 3 and leaves out the global batches 5 to 7 when it comes there."""
    config = small_config(workers=workers)
    whole = over_ranks(index, small_config(), 14)
    state = leave_out(open_state(index, config, 4, 5), 5, 3)
    found = over_ranks(index, config, 8, world=world, step=3, state=state)
    kept = [*whole[3:5], *whole[8:14]]
    assert_same([(step, *rest) for step, (_, *rest) in enumerate(kept, start=3)], found)


def test_the_keys_are_those_of_the_order_and_every_sample_comes_once(index):
    config = small_config()
    segment = open_state(index, config, 4, 5).at(0).streams[0]
    order = SampleOrder(segment, index.shard_samples)
    made = steps(index, config, 23)  # 4 epochs of 23 samples
    for step, batch in made:
        ids = order.sample_ids(positions(segment, step))
        assert batch.keys == [index.sample(int(i)).key for i in ids]
    keys = sorted(key for _, batch in made for key in batch.keys)
    assert keys == sorted([f"s{i:03d}" for i in range(23)] * 4)


def test_shapes_and_types(index):
    (_, batch), *_ = steps(index, small_config(crop=[24, 40]), 1)
    assert batch.images.shape == (4, 3, 24, 40) and batch.images.dtype == torch.uint8
    assert batch.segment_map.shape == (4, 1, 24, 40) and batch.segment_map.dtype == torch.int16
    assert batch.labels.dtype == batch.segment_layer.dtype == torch.int64
    for labels, segment_map in zip(batch.labels, batch.segment_map, strict=True):
        count = int((labels != NO_LABEL).sum())
        found = set(segment_map.unique().tolist())
        assert {v for v in found if v >= 0} == set(range(count))


def test_buffers_read_each_block_once_and_a_small_budget_reads_singly(index, monkeypatch):
    reads = []
    real = Storage.read

    def counted(self, *at):
        reads.append(at)
        return real(self, *at)

    monkeypatch.setattr(Storage, "read", counted)
    within = steps(index, small_config(), 5)  # the first window: 20 positions in 4 lanes
    blocks = len(reads)
    assert blocks <= 4 + 6  # one block a lane, and those begun at a lane's end
    reads.clear()
    singly = steps(index, small_config(buffer_mib=0), 5)
    assert len(reads) == 20
    for (_, a), (_, b) in zip(within, singly, strict=True):
        assert a.keys == b.keys and torch.equal(a.images, b.images)


def test_a_corrupt_image_is_replaced_inside_its_block_and_the_position_stays_true(tmp_path):
    sound = make_source(tmp_path / "sound", [8, 8])
    broken = make_source(tmp_path / "broken", [8, 8], truncated={5, 6, 7})
    for workers in (0, 2):
        config = small_config(workers=workers, block_samples=4)
        before, after = steps(sound, config, 4), steps(broken, config, 4)
        events = [event for _, batch in after for event in batch.events if event["event"] == "quarantine"]
        assert {(e["key"], e["replaced_by"]) for e in events} == {("s005", "s004"), ("s006", "s004"), ("s007", "s004")}
        record = broken.sample(5)
        event = next(e for e in events if e["key"] == "s005")
        assert (event["shard"], event["offset"]) == (record.shard, record.offset) and "not decode" in event["reason"]
        replaced = {"s005": "s004", "s006": "s004", "s007": "s004"}
        for (_, a), (_, b) in zip(before, after, strict=True):
            assert [replaced.get(key, key) for key in a.keys] == b.keys
            for row, (old, new) in enumerate(zip(a.keys, b.keys, strict=True)):
                assert old != new or torch.equal(a.images[row], b.images[row])


def test_a_block_without_a_good_sample_stops_the_run(tmp_path):
    broken = make_source(tmp_path, [4, 4], truncated={0, 1, 2, 3})
    for workers in (0, 1):
        with pytest.raises(GuardError, match=r"none of the 4 samples of a block decodes.*part-000\.tar"):
            steps(broken, small_config(workers=workers), 4)


def test_a_shard_that_goes_missing_is_one_clear_error(tmp_path):
    index = make_source(tmp_path, [4, 4])
    (tmp_path / "part-001.tar").unlink()
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"^part-001\.tar cannot be read: FileNotFoundError"):
            steps(index, small_config(workers=workers), 4)


def test_a_state_of_another_index_is_refused(index, tmp_path):
    config = small_config()
    state = open_state(make_source(tmp_path / "other", [3]), config, 4)
    with pytest.raises(UserError, match="another index"):
        train_steps([index], state, config, rank=0, world=1, step=0)


def test_workers_outlive_the_signals_of_a_stop_and_leave_quietly(index, capfd):
    config = small_config(workers=2)
    stream = train_steps([index], open_state(index, config, 4), config, rank=0, world=1, step=0)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            assert worker.pid
            os.kill(worker.pid, number)
    assert [step for step, _ in islice(stream, 10)] == list(range(1, 11))
    before = time.monotonic()
    stream.close()
    assert time.monotonic() - before < 4 and not multiprocessing.active_children()
    assert capfd.readouterr() == ("", "")


def test_a_dead_worker_is_an_error_that_names_it(index):
    config = small_config(workers=2)
    stream = train_steps([index], open_state(index, config, 4), config, rank=0, world=2, step=0)
    next(stream)
    victim = multiprocessing.active_children()[0]
    victim.kill()
    last = r"its last sample is s\d+ in part-\d+\.tar of .*"
    with pytest.raises(RuntimeError, match=rf"worker [01] \(pid {victim.pid}, exit code -9, {last}\) died"):
        for _ in range(50):
            next(stream)


def test_the_stream_draws_nothing_from_global_generators(index):
    torch.manual_seed(1)
    before = torch.get_rng_state(), str(np.random.get_state())
    for workers in (0, 1):
        steps(index, small_config(workers=workers), 2)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == str(np.random.get_state())


def test_a_stream_travels_to_a_spawned_process(index):
    """Where fork is not the default, all a worker needs travels pickled."""
    config = small_config()
    state = open_state(index, config, 4, 5)
    orders = {index.digest: order_of(index, state.at(0).streams[0])}
    stream = RankStream((index,), orders, state, config, np.arange(4), 0, Places([index], 1))
    spawn = multiprocessing.get_context("spawn")
    told = spawn.SimpleQueue()
    process = spawn.Process(target=_tell_first_keys, args=(stream, told))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0 and told.get() == steps(index, config, 1)[0][1].keys
    assert stream.places.describe(0).startswith("its last sample is ")


def _tell_first_keys(stream: RankStream, told: Any) -> None:
    part = next(iter(stream))
    assert not isinstance(part, Exception)
    told.put(part.keys)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two sources of one vocabulary, of 11 and 23 samples."""
    folder = tmp_path_factory.mktemp("pair")
    return [make_source(folder / "a", [4, 7]), make_source(folder / "b", [13, 10])]


def several(pair, config, count, *, rank=0, world=1, step=0, state=None):
    state = state or open_state(pair, config, 6, 5, weights=(1, 2))
    stream = train_steps(pair, state, config, rank=rank, world=world, step=step)
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


@pytest.mark.parametrize("shuffle", ["blocks", "full"])
def test_several_sources_share_every_global_batch_in_any_layout(pair, shuffle):
    """Two of six samples from the first source; every sample of each once an epoch; any ranks, workers and starts."""
    config = small_config(shuffle=shuffle)
    whole = several(pair, config, 16)
    state = open_state(pair, config, 6, 5, weights=(1, 2))
    for step, batch in whole:
        taken = [
            pair[number].sample(int(sample_id)).key
            for number, stream in enumerate(state.at(step).streams)
            for sample_id in order_of(pair[number], stream).sample_ids(positions(stream, step))
        ]
        assert batch.keys == taken and len(taken) == 6
    first = [key for _, batch in whole for key in batch.keys[:2]]
    assert sorted(first[:10]) == sorted(set(first[:10]))
    for world, workers, start in ((2, 0, 0), (3, 2, 3), (1, 3, 2), (6, 1, 1)):
        ranks = [
            several(pair, small_config(shuffle=shuffle, workers=workers), 4, rank=r, world=world, step=start)
            for r in range(world)
        ]
        for number in range(4):
            parts = [rank[number][1] for rank in ranks]
            lanes = np.argsort([lane for r in range(world) for lane in range(r, 6, world)])
            joined, (step, wanted) = join(parts), whole[start + number]
            assert all(rank[number][0] == step for rank in ranks)
            assert [joined.keys[i] for i in lanes] == wanted.keys
            assert torch.equal(joined.images[lanes], wanted.images)


def test_sources_that_cannot_be_read_together_are_refused(pair, tmp_path):
    def refused(*names: str, **changes: object) -> str:
        with pytest.raises(UserError) as caught:
            open_training(small_config(sources=[SourceConfig(str(name)) for name in names], **changes))
        return str(caught.value)

    first, second = (index.source for index in pair)
    assert "two training sources are the same" in refused(first, second, first)
    assert "data.train is not set" in refused()
    classes = tmp_path / "classes"
    make_source(classes, [2], kind="semantic")
    assert "needs instances" in refused(str(classes)) and "data.task=semantic" in refused(str(classes))
    make_source(tmp_path / "instances", [2], kind="instance")
    assert "every pixel annotated" in refused(str(tmp_path / "instances"))
    head = json.loads((classes / HEAD).read_text())
    head["vocabulary"]["classes"][0]["name"] = "another"
    head["kind"] = "panoptic"
    (classes / HEAD).write_text(json.dumps({**head, "digest": head_digest(head)}))
    assert "label differently" in refused(first, str(classes))


@pytest.mark.parametrize(("world", "batch", "count"), [(1, 4, 23), (3, 2, 10), (4, 3, 5), (2, 4, 99)])
def test_the_validation_loss_sees_its_samples_once(index, world, batch, count):
    ranks = [
        list(loss_batches(index, small_config(), count=count, batch=batch, rank=r, world=world)) for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(b) for batches in ranks for b in batches} == {batch}, "one shape: a compiled model is made for it"
    keys = sorted(key for batches in ranks for b in batches for key in b.keys if key)
    assert keys == [f"s{i:03d}" for i in range(min(count, 23))]
    for part in (b for batches in ranks for b in batches):
        assert part.keys == sorted(part.keys, key=lambda key: key == "")  # surplus stands at the end
        for row, key in enumerate(part.keys):
            blank = bool((part.segment_map[row] == IGNORE).all() and (part.labels[row] == NO_LABEL).all())
            assert blank == (key == "")


@pytest.mark.parametrize("world", [1, 2, 5, 30])
def test_evaluation_counts_every_sample_once(index, world):
    ranks = [list(eval_samples(index, small_config(), rank=r, world=world)) for r in range(world)]
    assert len({len(samples) for samples in ranks}) == 1
    counted = sorted(s.key for samples in ranks for s in samples if s.weight)
    assert counted == [f"s{i:03d}" for i in range(23)]
    sample = ranks[0][0]
    assert sample.image.shape == (40, 56, 3) and sample.segment_map.shape == (1, 40, 56)
    assert sample.crowd.tolist() == [False, False, False, True]
    assert (sample.segment_map[0, 20:, -4:] == -1).all()


def test_bad_validation_samples_are_told_never_left_out_silently(tmp_path):
    index = make_source(tmp_path, [5], truncated={1}, layers=2)
    batches = list(loss_batches(index, small_config(), count=5, batch=3, rank=0, world=1))
    assert [b.keys for b in batches] == [["s000", "s002", ""], ["s003", "s004", ""]]
    assert [e["key"] for b in batches for e in b.events] == ["s001"]
    assert batches[0].segment_map.shape[1] == 2 and json.dumps(batches[0].events)
    with pytest.raises(UserError, match="sample s001 does not decode"):
        list(eval_samples(index, small_config(), rank=0, world=1))
