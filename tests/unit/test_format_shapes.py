"""Polygons and run lengths -> masks -> layers: equal to pycocotools, and safe where that is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_tools.formats.shapes import compact_polygons, draw, layered, runs_of, short_polygons
from data_tools.record import BadRecord, RecordSegment
from tests.unit.packed_formats import SAMPLE

rle = pytest.importorskip("pycocotools.mask", reason="polygons are drawn with pycocotools")
SIZE = (20, 30)
SQUARE = [[2.0, 3.0, 12.0, 3.0, 12.0, 9.0, 2.0, 9.0]]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools


def peer(shape, size: tuple[int, int]) -> np.ndarray:
    """What pycocotools makes of a sound shape."""
    if isinstance(shape, list):
        return rle.decode(rle.merge(rle.frPyObjects(shape, *size))) > 0
    return rle.decode(rle.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape) > 0


def test_real_shapes_are_drawn_as_pycocotools_does():
    kinds = set()
    for listing in (SAMPLE / "coco_stuff" / "annotations").glob("*.json"):
        data = json.loads(listing.read_text())
        sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
        for annotation in data["annotations"]:
            shape, size = annotation["segmentation"], sizes[annotation["image_id"]]
            mask = draw(compact_polygons(shape), size)
            assert mask.dtype == bool and (mask == peer(shape, size)).all()
            kinds.add(type(shape))
    assert kinds == {list, dict}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (40, 3), (300, 400)])
def test_run_lengths_come_back_packed_and_as_a_list(size, share):
    mask = np.random.default_rng(3).random(size) < share
    packed = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int)]))).tolist()
    counts = np.diff([0, *edges, mask.size]).tolist()
    for shape in (packed, {**packed, "counts": packed["counts"].decode()}, {"size": list(size), "counts": counts}):
        assert (draw(shape, size) == mask).all()


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"size": SIZE, "counts": ""}, "neither"),  # pycocotools would return whatever was in memory
        ({"size": SIZE, "counts": [600 - 1]}, "add up"),
        ({"size": SIZE, "counts": [700, -100]}, "add up"),
        ({"size": SIZE, "counts": [2**62] * 4 + [600]}, "add up"),  # the sum of 64 bits comes out right
        ({"size": SIZE, "counts": "!!"}, "neither"),
        ({"size": SIZE, "counts": "o" * 12 + "0"}, "neither"),
        ({"size": SIZE, "counts": "ä"}, "neither"),
        ({"size": SIZE, "counts": [2**70]}, "neither"),
        ({"size": (30, 20), "counts": [600]}, "size"),
        ({"counts": [600]}, "neither"),
        ("polygon", "neither"),
        (None, "neither"),
        ([[1, 2, 3, 4, 5, "six"]], "neither"),
        ([[1, 2, 3, 4, 5, 6, 7]], "pairs"),
        ([[[1, 2], [3, 4], [5, 6], [1, 2], [3, 4], [5, 6]]], "pairs"),
        ([[1, 2, 3, 4, 5, 1e9]], "far out"),  # pycocotools would take memory for every pixel on the way
        ([[1, 2, 3, 4, 5, float("nan")]], "far out"),
        ([[0, 0, 60, 0, 0, 0] * 50_000], "without end"),
    ],
)
def test_what_is_no_shape_is_refused(shape, why):
    with pytest.raises(BadRecord, match=why):
        draw(compact_polygons(shape), SIZE)


def test_polygons_without_three_points_are_left_out_and_counted():
    shape = [[1.0, 2.0, 3.0, 4.0], *SQUARE]  # pycocotools takes four numbers for a box
    assert short_polygons(shape) == 1 and short_polygons({"size": SIZE, "counts": [600]}) == 0
    assert (draw(shape, SIZE) == peer(SQUARE, SIZE)).all()
    assert not draw([], SIZE).any() and not draw([[1.0, 2.0, 3.0, 4.0]], SIZE).any()


def test_overlapping_masks_keep_every_pixel_on_few_layers():
    rng = np.random.default_rng(0)
    masks = []
    for number in range(40):
        top, left = rng.integers(0, (15, 25))
        mask = np.zeros(SIZE, bool)
        mask[top : top + rng.integers(1, 6), left : left + rng.integers(1, 6)] = True
        masks.append((RecordSegment(number % 5, 0, True, False, number), mask))
    packed = [(segment, rle.encode(np.asfortranarray(mask.astype(np.uint8)))) for segment, mask in masks]
    layers = layered([(segment, runs_of(shape, SIZE)) for segment, shape in packed], SIZE)
    by_id = {segment.source_id: mask for segment, mask in masks}
    areas = []
    for number, segment in enumerate(layers.segments):
        assert (layers.maps[segment.layer] == number).sum() == by_id[segment.source_id].sum()
        assert ((layers.maps[segment.layer] == number) == by_id[segment.source_id]).all()
        areas.append(by_id[segment.source_id].sum())
        for lower in layers.maps[: segment.layer]:  # no layer below was free
            assert (lower[by_id[segment.source_id]] >= 0).any()
    assert areas == sorted(areas) and len(layers.segments) == 40 and 1 < len(layers.maps) < 15
    assert (layers.covered() == np.logical_or.reduce([mask for _, mask in masks])).all()


@pytest.mark.parametrize("share", [0.002, 0.1, 0.9])
def test_a_shape_is_drawn_in_the_smallest_box(share):
    rng = np.random.default_rng(1)
    for height, width in (*rng.integers(1, 40, (60, 2)), (600, 1), (1, 600)):
        mask = rng.random((height, width)) < share
        mask[rng.integers(height), rng.integers(width)] = True
        runs = runs_of(rle.encode(np.asfortranarray(mask.astype(np.uint8))), mask.shape)
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        assert runs.window() == window and runs.area == mask.sum()
        assert (runs.inside(window) == mask[window]).all() and runs.inside(window).shape == mask[window].shape
