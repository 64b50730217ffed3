"""Repeats of a source whose labels are mapped: the order, and the sums, of the same source packed with those labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_scale.data import index as index_module
from mf_scale.data import kept, repeat
from mf_scale.data.index import SCHEMA, Index
from mf_scale.data.order import SampleOrder, Stream
from mf_scale.data.repeat import STRIDE, UNIT, repeat_factors, sample_factors
from mf_scale.unify import LEFT_OUT, UnifiedSource
from mf_scale.vocabulary import ClassInfo, Vocabulary

PACKED = 9
Lists = list[list[int]]


def vocabulary(classes: int) -> Vocabulary:
    return Vocabulary(f"of{classes}", tuple(ClassInfo(f"c{k}", True, k) for k in range(classes)))


def index_of(lists: Lists, classes: int, shards: list[int]) -> Index:
    """An index of images that hold these labels, in memory."""
    count = len(lists)
    numbers = np.arange(count)
    columns = {
        "shard": np.repeat(np.arange(len(shards)), shards),
        "key": [f"s{i}" for i in range(count)],
        **dict.fromkeys(("offset", "size", "height", "width", "segments"), numbers),
        "class_ids": lists,
    }
    arrays = [pa.array(columns[field.name], type=field.type) for field in SCHEMA]
    head: dict[str, Any] = {
        "vocabulary": vocabulary(classes).to_dict(),
        "shards": [{"name": f"{i}.tar", "size": 1, "sha256": "", "samples": n} for i, n in enumerate(shards)],
        "columns": {"name": "samples.arrow", "sha256": "the same"},
        **{"digest": "d", "crowd": "none", "unlabelled": "none", "kind": "panoptic", "labels": None},
    }
    return Index("https://localhost/nowhere", head, pa.Table.from_arrays(arrays, schema=SCHEMA))


def way_by(labels: list[int], classes: int) -> UnifiedSource:
    own = np.array(labels, np.int64)
    known = np.isin(np.arange(classes), own)
    return UnifiedSource("packed", "", own, known, np.zeros(classes, bool), ())


@st.composite
def mapped_sources(draw: Any) -> tuple[Index, Index]:
    """A source seen through a map, and the same packed with the labels of the map.

    Images without a class are drawn, maps that leave out so much that others become so, and maps that fold.
    """
    classes = draw(st.integers(1, PACKED + 2))
    labels = draw(st.lists(st.integers(-1, classes - 1), min_size=PACKED, max_size=PACKED))
    shards = draw(st.lists(st.integers(1, 5 * STRIDE), min_size=1, max_size=3))
    generator = np.random.Generator(np.random.PCG64(draw(st.integers(0, 10**6))))
    rarest = draw(st.sampled_from([1.0, 3.0, 8.0]))
    lists = [
        np.unique((PACKED * generator.random(generator.integers(0, 4)) ** rarest).astype(int)).tolist()
        for _ in range(sum(shards))
    ]
    unified = [sorted({labels[k] for k in own} - {LEFT_OUT}) for own in lists]
    seen = index_of(lists, PACKED, shards).seen_as(vocabulary(classes), way_by(labels, classes))
    return seen, index_of(unified, classes, shards)


@settings(max_examples=80, deadline=None)
@given(
    sources=mapped_sources(),
    threshold=st.sampled_from([0.001, 0.1, 0.5, 1.0]),
    block=st.integers(1, 200),
    seed=st.integers(0, 2**40),
    shuffle=st.sampled_from(["blocks", "full"]),
    chunk=st.sampled_from([STRIDE, 4 * STRIDE, 1 << 18]),
)
def test_the_order_of_a_mapped_source_is_that_of_one_packed_so(
    sources: tuple[Index, Index], threshold: float, block: int, seed: int, shuffle: str, chunk: int
) -> None:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeat, "_CHUNK", chunk)
        patch.setattr(index_module, "_COUNTED", chunk)
        for index in sources:
            bounds = index.block_bounds(block)
            factors = repeat_factors(index, threshold, bounds)
            law = block, shuffle, threshold, 0, 0
            stream = Stream(0, index.digest, index.samples, factors.length, 8, seed, *law)
            order = SampleOrder(stream, index.shard_samples, factors, bounds)
            copies = np.arange(factors.length)
            found.append(
                [
                    index.class_counts(),
                    factors.class_factors,
                    factors.sums,
                    factors.strided,
                    np.array(factors.added),
                    *(factors.samples_of(copies, remainder) for remainder in (0, 1, UNIT - 1)),
                    order.sample_ids(np.arange(3 * factors.length)),
                ]
            )
    for mapped, packed in zip(*found, strict=True):
        assert np.array_equal(mapped, packed)
    assert np.array_equal(np.unique(found[0][-1]), np.arange(sources[0].samples)), "nobody is left out"


def test_an_image_of_which_nothing_is_left_comes_once_and_a_folded_class_by_both_parts() -> None:
    """100 images: 90 of class 0, 5 of class 1, 4 of class 2, the last of classes 0 and 3."""
    index = index_of([[0]] * 90 + [[1]] * 5 + [[2]] * 4 + [[0, 3]], 4, [100])

    def factors(labels: list[int]) -> np.ndarray:
        seen = index.seen_as(vocabulary(3), way_by(labels, 3))
        made = repeat_factors(seen, 0.2, index.block_bounds(16))
        return sample_factors(seen, made.class_factors, 0, 100) / UNIT

    share = np.array([0.2, 0.2, 0.2, 0.2])
    folded, left_out = factors([0, 1, 1, LEFT_OUT]), factors([0, LEFT_OUT, 1, 2])
    assert np.allclose(folded[[0, 90, 95, 99]], np.maximum(1, share / [1, 0.09, 0.09, 1]) ** 0.5, atol=1e-4)
    assert np.allclose(left_out[[0, 90, 95, 99]], np.maximum(1, share / [1, 1, 0.04, 0.01]) ** 0.5, atol=1e-4)


def test_sums_that_are_kept_of_one_map_are_not_taken_for_those_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large index they lie in a file, by what they were made of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    generator = np.random.Generator(np.random.PCG64(5))
    lists = [np.unique((6 * generator.random(3) ** 4).astype(int)).tolist() for _ in range(300)]
    index = index_of(lists, 6, [300])
    bounds = index.block_bounds(16)
    maps = {
        "plain": None,
        "same": way_by([0, 1, 2, 3, 4, 5], 6),
        "turned": way_by([5, 4, 3, 2, 1, 0], 6),
        "folded": way_by([0, 0, 0, 1, 1, 2], 6),
        "folded otherwise": way_by([0, 0, 0, 1, 2, 2], 6),
        "fewer classes": way_by([0, 0, 0, 1, 1, 2], 3),
        "left out": way_by([0, 1, 2, 3, 4, LEFT_OUT], 6),
    }

    def sums(name: str) -> list[int]:
        way = maps[name]
        seen = index if way is None else index.seen_as(vocabulary(len(way.known)), way)
        factors = repeat_factors(seen, 0.5, bounds)
        return [factors.added, *factors.class_factors, *factors.sums, *factors.strided]

    monkeypatch.setattr(Index, "open", lambda *_: pytest.fail("opened again"))
    plain = {name: sums(name) for name in maps}
    monkeypatch.setattr(kept, "KEPT_FROM", 1)
    for names in (list(maps), list(reversed(maps))):
        assert all(sums(name) == plain[name] for name in names)
    assert len(list((tmp_path / "mf_scale").glob("*.kept"))) == len(maps), "one of each map"
    with monkeypatch.context() as patch:
        patch.setattr(Index, "class_counts", lambda self: pytest.fail("summed again"))
        assert all(sums(name) == plain[name] for name in maps)
    assert plain["turned"] != plain["plain"] != plain["left out"] != plain["folded"] != plain["folded otherwise"]
