"""What the stream costs: a late start reads no more than an early one, memory stays where it is over epochs."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mf_scale.bench.index_made import write_index
from mf_scale.data.index import Index
from mf_scale.data.loader import train_steps
from mf_scale.data.making import make_reader
from mf_scale.data.order import SampleOrder, positions
from mf_scale.data.storage import Storage
from tests.sources import make_source, open_state, small_config

pytestmark = pytest.mark.integration
G = 8
LATE = 1_000_000


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_source(tmp_path_factory.mktemp("costs"), [60, 40, 60])


def reads_of(index: Index, first: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int, int]]:
    """Ranged reads of some steps from `first` on, in one process."""
    seen: Counter[tuple[str, int, int]] = Counter()
    plain = Storage.read

    def read(self: Storage, name: str, offset: int, size: int, *rest: object) -> bytes:
        seen[name, offset, size] += 1
        return plain(self, name, offset, size, *rest)

    config = small_config(block_samples=10)
    with (
        monkeypatch.context() as patch,
        closing(train_steps([index], open_state(index, config, G), config, rank=0, world=1, step=first)) as stream,
    ):
        patch.setattr(Storage, "read", read)
        assert [step for step, _ in islice(stream, steps)] == list(range(first, first + steps))
    return seen


@pytest.mark.parametrize("steps", [1, 20])
def test_a_late_start_reads_what_an_early_one_does(index, monkeypatch, steps):
    """One block a lane at the start and nothing of what lies before; over an epoch every block once, or twice where it
    lies across two lanes."""
    for first in (0, LATE, LATE + 7):
        seen = reads_of(index, first, steps, monkeypatch)
        assert max(seen.values()) == 1 or steps > 1
        if steps == 1:
            assert len(seen) <= G
        else:
            blocks = sum(-(-count // 10) for count in index.shard_samples)
            assert len(seen) <= blocks + 1  # a window that begins inside an epoch ends in a block of the next
            assert sum(seen.values()) <= blocks + 2 * G


def private_kib(pid: int) -> int:
    """Memory of its own, KiB; pages of mapped files are the kernel's."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))


def test_memory_of_the_workers_stays_where_it_is_over_epochs(index):
    config = small_config(block_samples=10, workers=2)
    epoch = index.samples // G
    with closing(train_steps([index], open_state(index, config, G), config, rank=0, world=1, step=0)) as stream:
        used = []
        for _ in range(4):
            assert len(list(islice(stream, epoch))) == epoch
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            used.append([private_kib(worker.pid) for worker in workers if worker.pid])
    growth = np.array(used[3]) - np.array(used[0])
    assert growth.max() < 6 * 1024, used


def test_a_lane_lets_go_of_the_block_it_has_left(index):
    reader = make_reader(index, small_config(block_samples=10))
    (stream,) = open_state(index, small_config(block_samples=10), G).at(0).streams
    order = SampleOrder(stream, index.shard_samples)
    for step in range(40):
        for lane, sample_id in enumerate(order.sample_ids(positions(stream, step))):
            reader.load(int(sample_id), lane)
        assert len(reader._buffers) <= G


def test_an_index_of_a_million_samples_takes_little_memory_of_its_own(tmp_path):
    """Under 200 MiB a process and far less, whether it opens the index or makes plans from it."""
    write_index(tmp_path, 1_000_000)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        opened, planned, samples = pool.apply_async(_memory_of_plans, (str(tmp_path),)).get(timeout=120)
    assert samples == 1_000_000
    assert opened < 40 * 1024 and planned < 60 * 1024, (opened, planned)


def _memory_of_plans(source: str) -> tuple[int, int, int]:
    before = private_kib(os.getpid())
    index = Index.open(source)
    opened = private_kib(os.getpid()) - before
    state = open_state(index, small_config(block_samples=128), 512)
    (stream,) = state.at(0).streams
    for step in (0, LATE):
        order = SampleOrder(stream, index.shard_samples)
        assert len(set(order.sample_ids(positions(stream, step)).tolist())) == 512
    return opened, private_kib(os.getpid()) - before, index.samples
