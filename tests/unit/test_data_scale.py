"""The data plane at scale: the same order as ever, memory that does not grow with the images, work done once."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mf_scale.bench import index_scale
from mf_scale.bench.index_made import write_index
from mf_scale.bench.index_scale import Scale, bench_index
from mf_scale.data import index as index_module
from mf_scale.data import kept, loader, rows
from mf_scale.data import order as order_module
from mf_scale.data.blocks import block_bounds
from mf_scale.data.index import COLUMNS, HEAD, Index, Shard, head_digest
from mf_scale.data.order import SampleOrder, Stream, positions
from mf_scale.data.repeat import UNIT, repeat_factors, sample_factors
from mf_scale.data.shard_table import ShardTable
from mf_scale.data.sources import order_of
from mf_scale.errors import UserError
from tests.sources import make_source, open_state, small_config
from tests.unit.test_untrusted_shards import rewritten

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "orders.json").read_text())
MIB = 1 << 20


@pytest.mark.parametrize("case", GOLDEN["orders"], ids=lambda case: case["name"])
def test_orders_are_those_of_earlier_programs(case):
    """A run goes on where an earlier program stopped: digests of sample ids that the first of them drew."""
    shards, seed, threshold = GOLDEN["shard_samples"], case["seed"], case["threshold"]
    samples, generator = sum(shards), np.random.Generator(np.random.PCG64(seed))
    ends = np.concatenate([[0], np.cumsum(generator.integers(0, 5, samples))])
    labels = (30 * generator.random(int(ends[-1])) ** 4).astype(np.int32)

    def lists(first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return ends[first : end + 1] - ends[first], labels[ends[first] : ends[end]]

    source: Any = SimpleNamespace(
        samples=samples,
        way=None,
        class_counts=lambda: np.bincount(labels, minlength=30).astype(np.int64),
        class_lists=lists,
        packed_lists=lists,
    )
    repeats = repeat_factors(source, threshold, block_bounds(shards, case["block"])) if threshold else None
    length = repeats.length if repeats else samples
    law = case["block"], case["shuffle"], threshold
    stream = Stream(case["source"], "d", samples, length, case["count"], seed, *law, 3, 2)
    order = SampleOrder(stream, shards, repeats)
    ids = np.concatenate([order.sample_ids(positions(stream, step)) for step in GOLDEN["steps"]])
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == case["digest"]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """An index of 1.2 million samples: seven million class ids, ten million bytes a number column."""
    folder = tmp_path_factory.mktemp("large")
    write_index(folder, 1_200_000, 20_000)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mf_scale"


def peak_mib(act: Callable[[], Any]) -> float:
    """The most memory that Python and numpy took for it."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_images(large):
    """Every bound is below what one copy of a number column (or of the class ids) would take at this size."""
    assert peak_mib(lambda: Index.open(large)) < 45  # the head: 1200 shards and 20,000 classes
    index = Index.open(large)
    assert len(index.class_lists(0, index.samples)[1]) * 8 > 50 * MIB
    assert peak_mib(index._check_rows) < 10
    assert peak_mib(index.class_counts) < 40
    assert np.array_equal(index.class_counts(), np.bincount(index.class_lists(0, index.samples)[1], minlength=20_000))
    bounds = index.block_bounds(128)
    assert peak_mib(lambda: repeat_factors(index, 0.001, bounds)) < 45
    repeats = repeat_factors(index, 0.001, bounds)
    stream = Stream(0, index.digest, index.samples, repeats.length, 4096, 0, 128, "blocks", 0.001, 0, 0)
    order = order_of(index, stream)
    assert peak_mib(lambda: order.sample_ids(positions(stream, 1_000_000))) < 20


def test_blocks_share_one_table_of_bounds(large):
    index = Index.open(large)
    stream = Stream(0, index.digest, index.samples, index.samples, 4096, 0, 128, "blocks", 0.0, 0, 0)
    assert order_of(index, stream).bounds is index.block_bounds(128)
    assert np.array_equal(index.block_bounds(128), block_bounds([1000] * 1200, 128))


def test_workers_are_forked_with_the_order_of_the_epoch(tmp_path, monkeypatch):
    index = make_source(tmp_path, [40, 24])
    streams: list[Any] = []
    monkeypatch.setattr(loader, "_steps", lambda stream, rank, give_up: streams.append(stream))
    config = small_config(block_samples=10)
    loader.train_steps([index], open_state(index, config, 8), config, rank=0, world=1, step=17)
    (order,) = streams[0].orders.values()
    made = order._epochs.copy()
    order.sample_ids(positions(order.stream, 17))
    assert made and order._epochs.keys() == made.keys()


def test_all_rows_are_checked_once_and_again_when_the_file_changes(large, monkeypatch, own_cache):
    calls = []
    checked = index_module.check_rows

    def check(*args: Any) -> None:
        calls.append(1)
        checked(*args)

    monkeypatch.setattr(index_module, "check_rows", check)
    for _ in range(3):
        assert Index.open(large).samples == 1_200_000
    (mark,) = own_cache.glob("*.kept")
    assert len(calls) == 1 and not list(own_cache.glob("*.lock"))
    mark.chmod(0o666)  # others could have made it
    Index.open(large)
    assert len(calls) == 2
    mark.write_bytes(b"x" + mark.read_bytes()[1:])
    Index.open(large)
    assert len(calls) == 3
    with (large / COLUMNS).open("r+b") as file:  # the same bytes again: the kernel cannot tell
        first = file.read(1)
        file.seek(0)
        file.write(first)
    os.utime(large / COLUMNS, ns=(1, 1))  # the time of the change can be set, that of the inode cannot
    Index.open(large)
    os.utime(large / COLUMNS, ns=(1, 1))
    Index.open(large)
    assert len(calls) == 5


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_rows_are_compared_across_the_chunks_they_are_looked_at_in(tmp_path, monkeypatch, chunk):
    index = make_source(tmp_path, [4, 3])
    monkeypatch.setattr(rows, "_CHUNK", chunk)
    Index.open(tmp_path)
    offsets = index.column("offset").tolist()
    for row in (1, 2, 3, 5, 6):
        rewritten(index, {"offset": [*offsets[:row], offsets[row] - 512, *offsets[row + 1 :]]})
        with pytest.raises(UserError, match="two samples overlap"):
            Index.open(tmp_path)


def test_an_index_that_lies_leaves_no_mark(tmp_path, monkeypatch, own_cache):
    monkeypatch.setattr(kept, "KEPT_FROM", 1)
    index = make_source(tmp_path / "source", [3, 2])
    assert len(list(own_cache.glob("*.kept"))) == 1
    rewritten(index, {"offset": [0, 0, 0, 0, 0]})
    for _ in range(2):
        with pytest.raises(UserError, match="malformed"):
            Index.open(index.source)
    assert len(list(own_cache.glob("*.kept"))) == 1


def test_repeat_factors_are_summed_once_and_kept_by_their_law(tmp_path, monkeypatch, own_cache):
    write_index(tmp_path, 5000, 50)
    index = Index.open(tmp_path)
    bounds = index.block_bounds(128)
    plain = repeat_factors(index, 0.1, bounds)
    monkeypatch.setattr(kept, "KEPT_FROM", 1)
    assert np.array_equal(repeat_factors(index, 0.1, bounds).sums, plain.sums)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "class_counts", lambda self: pytest.fail("summed again"))
        again = repeat_factors(index, 0.1, bounds)
        assert np.array_equal(again.sums, plain.sums) and np.array_equal(again.class_factors, plain.class_factors)
        assert again.added == plain.added
    assert repeat_factors(index, 0.2, bounds).length != plain.length
    assert len(repeat_factors(index, 0.1, index.block_bounds(64)).sums) == len(index.block_bounds(64))
    assert len(list(own_cache.glob("*.kept"))) == 3


def _ascends_no_more(sums: np.ndarray, strided: np.ndarray) -> None:
    sums[5] = sums[4]


def _stretch_without_copies(sums: np.ndarray, strided: np.ndarray) -> None:
    strided[7] = strided[6] + 1


def _begins_late(sums: np.ndarray, strided: np.ndarray) -> None:
    strided[0] = -1


def _half_a_copy(sums: np.ndarray, strided: np.ndarray) -> None:
    sums[-1] = strided[-1] = sums[-1] + UNIT // 2


def _two_lengths(sums: np.ndarray, strided: np.ndarray) -> None:
    strided[-1] += UNIT


@pytest.mark.parametrize(
    "spoil", [_ascends_no_more, _stretch_without_copies, _begins_late, _half_a_copy, _two_lengths, None]
)
def test_sums_that_cannot_be_are_made_again(tmp_path, monkeypatch, own_cache, spoil):
    """Whoever wrote them, and with a fitting digest: what is read of the index by them lies in it."""
    write_index(tmp_path, 5000, 50)
    monkeypatch.setattr(kept, "KEPT_FROM", 1)
    index = Index.open(tmp_path)
    mark = set(own_cache.glob("*.kept"))
    plain = repeat_factors(index, 0.1, index.block_bounds(128))
    (made,) = set(own_cache.glob("*.kept")) - mark
    numbers = np.frombuffer(made.read_bytes()[32:], np.int64).copy()
    if spoil:
        spoil(*np.split(numbers[51:], [len(plain.bounds)]))
    kept._write(made, numbers if spoil else numbers[:-1])
    again = repeat_factors(index, 0.1, index.block_bounds(128))
    assert np.array_equal(again.sums, plain.sums) and np.array_equal(again.strided, plain.strided)
    assert np.frombuffer(made.read_bytes()[32:], np.int64).tolist() == [
        plain.added,
        *plain.class_factors,
        *plain.sums,
        *plain.strided,
    ]


def test_a_copy_at_the_very_bound_belongs_to_the_sample_behind_it(tmp_path):
    """Factors of one, so every sum is a whole number of copies, and a remainder of none meets it exactly."""
    write_index(tmp_path, 500, 5)
    index = Index.open(tmp_path)
    repeats = repeat_factors(index, 1e-9, index.block_bounds(128))
    for remainder in (0, 1, UNIT - 1):
        assert repeats.samples_of(np.arange(500), remainder).tolist() == list(range(500))


def test_an_epoch_laid_out_in_parts_is_that_of_the_whole(tmp_path, monkeypatch):
    write_index(tmp_path, 5000, 40)
    index = Index.open(tmp_path)
    for threshold in (0.0, 0.1):
        length = repeat_factors(index, threshold, index.block_bounds(16)).length if threshold else 5000
        stream = Stream(0, index.digest, 5000, length, 64, 0, 16, "blocks", threshold, 0, 0)
        whole = order_of(index, stream).sample_ids(np.arange(length))
        with monkeypatch.context() as patch:
            patch.setattr(order_module, "_CHUNK", 7)
            assert np.array_equal(order_of(index, stream).sample_ids(np.arange(length)), whole)


def test_copies_are_found_in_any_order_and_any_number(tmp_path):
    """More of them than are looked for at once, and some twice: each belongs to the sample that a plain count says."""
    write_index(tmp_path, 1500, 40)
    index = Index.open(tmp_path)
    repeats = repeat_factors(index, 0.3, index.block_bounds(128))
    behind = np.cumsum(sample_factors(index, repeats.class_factors, 0, 1500))
    behind += (np.arange(1500) + 1) * repeats.added // 1500
    generator = np.random.Generator(np.random.PCG64(3))
    for remainder in (0, 12_345, UNIT - 1):
        owners = np.repeat(np.arange(1500), np.diff((behind + remainder) >> 16, prepend=0))
        copies = generator.integers(0, repeats.length, 3000)
        assert len(owners) == repeats.length
        assert np.array_equal(repeats.samples_of(copies, remainder), owners[copies])
    assert repeats.samples_of(np.empty(0, np.int64), 0).shape == (0,)


def test_processes_that_start_together_work_it_out_once(tmp_path, own_cache):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map_async(_keep, [str(tmp_path / "calls")] * 8, chunksize=1).get(timeout=60)
    assert found == [[5, 6]] * 8 and (tmp_path / "calls").read_text() == "made\n"


def _keep(calls: str) -> list[int]:
    def make() -> np.ndarray:
        with Path(calls).open("a") as file:
            file.write("made\n")
        time.sleep(0.2)
        return np.array([5, 6])

    source: Any = SimpleNamespace(samples=kept.KEPT_FROM, identity=("digest",))
    return kept.kept_array(source, ("law", 1), make, lambda found: len(found) == 2).tolist()


def test_where_nothing_can_be_kept_it_is_worked_out(tmp_path, monkeypatch, own_cache):
    own_cache.parent.mkdir()
    own_cache.write_text("a file where the folder should be")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(own_cache))
    calls = tmp_path / "calls"
    assert [_keep(str(calls)), _keep(str(calls))] == [[5, 6]] * 2 and calls.read_text() == "made\n" * 2


def test_what_nobody_reads_goes(tmp_path, own_cache):
    _keep(str(tmp_path / "calls"))
    (old,) = own_cache.glob("*.kept")
    os.utime(old, (1, 1))
    kept._write(own_cache / "index-new.kept", np.array([1]))
    assert [path.name for path in own_cache.iterdir()] == ["index-new.kept"]


def test_the_table_of_shards_gives_back_what_it_was_told():
    told: list[Any] = [{"name": f"é-{i}.tar", "size": 1 << 40, "sha256": f"{i:064x}", "samples": i} for i in range(5)]
    table = ShardTable.from_head(told)
    assert list(table) == [Shard(**row) for row in told] and table[-1] == table[4] and len(table[1:3]) == 2
    assert table.samples.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        table[5]
    assert len(ShardTable.from_head([])) == 0


@pytest.mark.parametrize(
    "lie",
    [{"size": 1.5}, {"samples": "3"}, {"name": 7}, {"sha256": None}, {"more": 1}, {"name": "a\nb"}, {"size": 1 << 70}],
)
def test_a_head_whose_shards_are_malformed_is_refused(lie, tmp_path):
    index = make_source(tmp_path, [2])
    head = json.loads((tmp_path / HEAD).read_text())
    head["shards"][0] |= lie
    (tmp_path / HEAD).write_text(json.dumps({**head, "digest": head_digest(head)}))
    with pytest.raises(UserError, match="malformed"):
        Index.open(index.source)


def test_the_digest_in_pieces_is_that_of_the_whole(tmp_path):
    head = {"z": 1, "shards": [{"b": "é", "a": i} for i in range(3000)], "none": [], "deep": {"y": [1], "x": None}}
    text = json.dumps(head, sort_keys=True, ensure_ascii=False)
    assert head_digest({**head, "digest": "x"}) == hashlib.sha256(text.encode()).hexdigest()
    assert head_digest({}) == hashlib.sha256(b"{}").hexdigest()


def test_the_bench_runs_and_its_shares_are_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(index_scale, "_apart", lambda read, task: read(task))
    scale = Scale(samples=6000, classes=300, global_batch=64, ranks=16, workers=3, peer_samples=2000)
    text = bench_index(scale, folder=str(tmp_path), json_file=str(tmp_path / "told.json"))
    told = json.loads((tmp_path / "told.json").read_text())
    assert "blocks against the list at 2,000" in text and told["scale"]["ranks"] == 16
    assert text.count("CPU ms") == 3
    assert all(
        0 < reading["first_plan_cpu_ms"] < reading["first_plan_ms"] * 1.1 for reading in told["readings"].values()
    )
    assert {reading["samples"] for reading in told["readings"].values()} == {6000, 2000}
    assert 6000 * 80 < told["bytes"] < 6000 * 110
    assert [path.name for path in tmp_path.iterdir()] == ["told.json"]
    for wrong, said in ((Scale(100), "too few"), (Scale(ranks=7), "cannot share"), (Scale(10**13), "GB, .* are free")):
        with pytest.raises(UserError, match=said):
            bench_index(wrong, folder=str(tmp_path))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_million_images_on_512_ranks(tmp_path):
    """Under 200 MB of memory a process; plans under 50 ms of the processor: what others do to the clock is not ours."""
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("an index of a hundred million samples takes 8.4 GB")
    scale = Scale(100_000_000, 20_000, 4096, 512, 8, 100_000)
    bench_index(scale, folder=str(tmp_path), json_file=str(tmp_path / "told.json"))
    readings = json.loads((tmp_path / "told.json").read_text())["readings"]
    ours = [reading for name, reading in readings.items() if name != "list in memory"]
    assert len(ours) == 8 and [r["samples"] for r in ours].count(100_000_000) == 7
    for reading in ours:
        assert max(reading["private_mib"], reading["peak_mib"], reading["worker_mib"]) * MIB < 200e6
        assert max(reading["first_plan_cpu_ms"], reading["late_plan_cpu_ms"], reading["next_plan_cpu_ms"]) < 50
    assert all(
        reading["open_s"] < 5 and reading["order_s"] < 1 for name, reading in readings.items() if "later" in name
    )
