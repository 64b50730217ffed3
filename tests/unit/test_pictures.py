"""Drawn segments: colours, names, legends, files."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mf_scale.tracking.pictures import Segmentation, add_legend, class_color, draw_segments, write_png


def test_class_colours_are_fixed_and_neighbours_differ() -> None:
    colors = [class_color(k) for k in range(1000)]
    assert colors[:2] == [class_color(0), class_color(1)]
    assert all(0 <= c <= 255 for color in colors for c in color)
    apart = [np.abs(np.subtract(a, b)).max() for a, b in itertools.pairwise(colors)]
    assert min(apart) > 40
    assert len(set(colors[:200])) == 200


def test_truth_and_prediction_paint_a_class_alike() -> None:
    image = np.full((40, 40, 3), 128, dtype=np.uint8)
    left = np.where(np.arange(40) < 20, 0, -1)[None].repeat(40, axis=0)
    truth = draw_segments(image, Segmentation(left, np.array([3])), list("abcdef"))
    found = draw_segments(image, Segmentation(left + 1 - (left < 0), np.array([5, 3])), list("abcdef"))
    assert np.array_equal(truth, found)
    corner, void = truth[5, 5].astype(int), truth[5, -5].astype(int)
    assert np.abs(corner - (0.6 * np.array(class_color(3)) + 0.4 * 128)).max() <= 1
    assert np.ptp(void) == 0, "void is grey"


def test_names_are_written_on_segments_large_enough() -> None:
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    segment_map = np.zeros((100, 100), dtype=int)
    segment_map[:3, :3] = 1
    names = ["large", "tiny"]
    named = draw_segments(image, Segmentation(segment_map, np.array([0, 1])), names)
    only_one = draw_segments(image, Segmentation(segment_map, np.array([0, 1])), ["large", "another name"])
    unnamed = draw_segments(image, Segmentation(segment_map, np.array([0, 1])), ["", "tiny"])
    assert np.array_equal(named, only_one) and not np.array_equal(named, unnamed)


def test_pictures_of_any_shape_are_drawn() -> None:
    for height, width in ((1, 1), (3, 900), (900, 3)):
        image = np.zeros((height, width, 3), dtype=np.uint8)
        drawn = draw_segments(
            image, Segmentation(np.zeros((height, width), int), np.array([0])), ["a very long name " * 9]
        )
        assert max(drawn.shape[:2]) == 640 and drawn.dtype == np.uint8
    empty = draw_segments(np.zeros((9, 9, 3), np.uint8), Segmentation(np.full((9, 9), -1), np.array([], int)), [])
    assert np.ptp(empty) == 0


def test_the_legend_names_every_colour() -> None:
    picture = np.zeros((50, 300, 3), dtype=np.uint8)
    with_legend = add_legend(picture, [0, 1, 2], ["cat", "dog", "sky"])
    assert with_legend.shape[1] == 300 and with_legend.shape[0] > 50
    for label in range(3):
        assert (with_legend[50:] == class_color(label)).all(-1).any()
    assert np.array_equal(add_legend(picture, [], []), picture)


def test_png_files_keep_their_values(tmp_path: Path) -> None:
    color = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "new" / "c.png", color)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "c.png")), color)
    ids = np.array([[0, 1, 65534]], dtype=np.uint16)
    write_png(tmp_path / "m.png", ids)
    assert np.array_equal(np.asarray(cv2.imread(str(tmp_path / "m.png"), cv2.IMREAD_UNCHANGED)), ids)
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
