"""Waiting for data: storage that hangs costs time, never a sample, and the trainer can give up waiting."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mf_scale.data.index import Index
from mf_scale.data.loader import train_steps
from mf_scale.data.order import SampleOrder, positions
from tests.sources import make_source, open_state, small_config

WORKERS = 3


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return make_source(tmp_path, [9, 6, 8])


@contextmanager
def hanging(index: Index, number: int) -> Iterator[Callable[[], None]]:
    """A shard that nobody can open: a pipe without a writer. Called, it is a file again and whoever waits goes on."""
    shard = Path(index.source, index.shards[number].name)
    aside = shard.with_suffix(".aside")
    shard.rename(aside)
    os.mkfifo(shard)
    pipe = shard.with_suffix(".pipe")
    os.link(shard, pipe)

    def mend() -> None:
        aside.replace(shard)
        os.close(os.open(pipe, os.O_RDWR))  # whoever opened the pipe is let in, fails to seek and tries again

    yield mend


def stream(index: Index, give_up: Callable[[], bool]):
    config = small_config(workers=WORKERS)
    state = open_state(index, config, 4, 5)
    return train_steps([index], state, config, rank=0, world=1, step=0, give_up=give_up)


@pytest.mark.parametrize("shard", [0, 2])
def test_a_read_that_hangs_for_a_while_loses_and_reorders_nothing(index: Index, shard: int) -> None:
    with closing(stream(index, lambda: False)) as steps:
        undisturbed = list(islice(steps, 12))
    asked: list[float] = []

    def give_up() -> bool:
        asked.append(time.monotonic())
        return False

    with hanging(index, shard) as mend, closing(stream(index, give_up)) as steps:
        timer = threading.Timer(3.5, mend)
        timer.start()
        found = list(islice(steps, 12))
        timer.join()
    assert len(asked) >= 2 and all(0.9 < b - a < 2 for a, b in pairwise(asked))
    for (step, batch), (wanted, other) in zip(found, undisturbed, strict=True):
        assert step == wanted and batch.keys == other.keys and torch.equal(batch.images, other.images)


def test_whoever_gives_up_is_let_go_at_once_and_leaves_nobody_behind(index: Index) -> None:
    wanted_at = time.monotonic() + 1.5
    with hanging(index, 0), hanging(index, 1), hanging(index, 2):
        began = stream(index, lambda: time.monotonic() > wanted_at)
        assert list(islice(began, 1)) == []
        assert 0 < time.monotonic() - wanted_at < 2.5, "three workers that hang, each asked to leave, take 15 s"
    assert not multiprocessing.active_children()
    assert list(began) == []


def test_closing_does_not_wait_for_reads_that_hang(tmp_path: Path) -> None:
    index = make_source(tmp_path, [4] * 8)
    segment, starts = open_state(index, small_config(), 4, 5).at(0).streams[0], np.cumsum(index.shard_samples)
    order = SampleOrder(segment, index.shard_samples)
    wanted = [set(np.searchsorted(starts, order.sample_ids(positions(segment, s)), side="right")) for s in range(8)]
    first = {shard: next(s for s in range(8) if shard in wanted[s]) for shard in range(8)}
    shard, step = max(first.items(), key=lambda pair: pair[1])
    assert step > 1
    with hanging(index, shard):
        steps = stream(index, lambda: False)
        assert [number for number, _ in islice(steps, step)] == list(range(step))
        time.sleep(1)  # what is read ahead hangs by now
        before = time.monotonic()
        steps.close()
        assert time.monotonic() - before < 2
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_while_others_hang_is_named(index: Index) -> None:
    def kill() -> None:
        multiprocessing.active_children()[0].kill()

    with hanging(index, 0), hanging(index, 1), hanging(index, 2), closing(stream(index, lambda: False)) as steps:
        timer = threading.Timer(1.5, kill)
        timer.start()
        with pytest.raises(RuntimeError, match=r"rank 0: data worker [012] \(pid \d+, exit code -9.*\) died"):
            next(steps)
        timer.join()
