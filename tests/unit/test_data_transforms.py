"""Stored map -> targets of a task; geometry and colour, image and map together."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mf_scale.config.load import load_config
from mf_scale.config.validate import validate
from mf_scale.data.batch import IGNORE, NO_LABEL, NONE
from mf_scale.data.collate import blank_sample, collate, cut, join
from mf_scale.data.color import apply_color, draw_color
from mf_scale.data.decode import StoredSample
from mf_scale.data.targets import TargetRules, make_targets
from mf_scale.data.transforms import (
    DETR_SHORTER,
    PAD,
    Window,
    draw_detr_window,
    draw_window,
    fitted_sample,
    resize_map,
    resize_part,
    sample_generator,
    training_sample,
)
from mf_scale.errors import UserError
from tests.sources import small_config

THINGS = np.array([True, True, False, False])
HERE, VOID = 254, 255
"""Disk values of NONE and IGNORE."""


def rules(task: str = "panoptic", crowd: str = "none", unlabelled: str = "none") -> TargetRules:
    return TargetRules(task, THINGS, crowd, unlabelled)


def stored(rows: list[list[list[int]]], labels, layers=None, crowd=None) -> StoredSample:
    stored_map = np.array(rows, np.uint8)
    count = len(labels)
    return StoredSample(
        "k",
        np.zeros((*stored_map.shape[1:], 3), np.uint8),
        stored_map,
        np.array(labels, np.int64),
        np.array(layers or [0] * count, np.int64),
        np.array(crowd or [False] * count, bool),
    )


FLAT = stored([[[0, 1, 2, 3, 4, HERE, VOID]]], [2, 0, 0, 1, 3], crowd=[0, 0, 0, 1, 0])


@pytest.mark.parametrize(
    ("rule", "row", "labels"),
    [
        (rules(), [0, 1, 2, NONE, 3, NONE, IGNORE], [2, 0, 0, 3]),
        (rules(crowd="ignore"), [0, 1, 2, IGNORE, 3, NONE, IGNORE], [2, 0, 0, 3]),
        (rules(unlabelled="ignore"), [0, 1, 2, NONE, 3, IGNORE, IGNORE], [2, 0, 0, 3]),
        (rules(crowd="keep"), [0, 1, 2, 3, 4, NONE, IGNORE], [2, 0, 0, 1, 3]),
        (rules("semantic"), [2, 0, 0, 1, 3, NONE, IGNORE], [0, 1, 2, 3]),
        (rules("instance"), [NONE, 0, 1, NONE, NONE, NONE, IGNORE], [0, 0]),
        (rules("instance", "ignore", "ignore"), [NONE, 0, 1, IGNORE, NONE, IGNORE, IGNORE], [0, 0]),
    ],
)
def test_one_packed_source_serves_every_task(rule, row, labels):
    made = make_targets(FLAT.stored_map, FLAT, rule)
    assert made.segment_map.tolist() == [[row]] and made.segment_map.dtype == np.int16
    assert made.labels.tolist() == labels and made.dropped == 0
    assert made.crowd.tolist() == [label == 1 and rule.crowd == "keep" for label in labels]


def test_segments_cropped_away_are_dropped_and_the_map_renumbered():
    made = make_targets(FLAT.stored_map[:, :, 2:], FLAT, rules())
    assert made.segment_map.tolist() == [[[0, NONE, 1, NONE, IGNORE]]]
    assert made.labels.tolist() == [0, 3] and made.dropped == 2
    nothing = make_targets(FLAT.stored_map[:, :, 5:], FLAT, rules())
    assert nothing.labels.shape == (0,) and nothing.dropped == 4


def test_sixteen_bit_maps():
    labels = [0] * 300
    sample = stored([[[0]]], labels)
    wide = np.array([[[299, 0, 65534, 65535]]], np.uint16)
    made = make_targets(wide, sample, rules())
    assert made.segment_map.tolist() == [[[1, 0, NONE, IGNORE]]] and made.dropped == 298


def test_layers_keep_overlaps_and_layer_0_alone_ignores():
    two = stored(
        [[[0, 0, HERE, HERE, VOID, HERE]], [[1, HERE, 1, HERE, 1, 2]]], [0, 1, 1], layers=[0, 1, 1], crowd=[0, 0, 1]
    )
    made = make_targets(two.stored_map, two, rules(crowd="ignore"))
    assert made.segment_map.tolist() == [[[0, 0, NONE, NONE, IGNORE, IGNORE]], [[1, NONE, 1, NONE, 1, NONE]]]
    assert made.segment_layer.tolist() == [0, 1]
    made = make_targets(two.stored_map, two, rules(unlabelled="ignore"))
    assert made.segment_map[0].tolist() == [[0, 0, NONE, IGNORE, IGNORE, IGNORE]]
    made = make_targets(two.stored_map, two, rules("semantic"))
    assert made.segment_map.tolist() == [[[0, 0, 1, NONE, IGNORE, 1]]]


def picture(height: int, width: int) -> StoredSample:
    """A picture whose red and green are the map's cell: 8 x 8 cells."""
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    cells = (rows[:, None] * 8 + columns[None]).astype(np.uint8)
    image = np.stack([cells * 3, cells * 3, np.zeros_like(cells)], axis=-1)
    return StoredSample("k", image, cells[None], np.arange(64) % 4, np.zeros(64, np.int64), np.zeros(64, bool))


@pytest.mark.parametrize("resize", ["scale", "detr"])
@pytest.mark.parametrize("position", range(12))
def test_image_and_map_stay_together(position, resize):
    sample = picture(120, 160)
    config = small_config(crop=[48, 64], color=False, scale=[0.8, 2.5], resize=resize)
    made = training_sample(
        sample, config, TargetRules("panoptic", np.ones(4, bool), "none", "none"), sample_generator(1, position)
    )
    assert made.image.shape == (3, 48, 64) and made.targets.segment_map.shape == (1, 48, 64)
    outside = made.targets.segment_map[0] == IGNORE
    assert (made.image[:, outside] == PAD).all()
    shown, segment = made.image[0].astype(int) / 3, made.targets.segment_map[0]
    middle = segment[1:-1, 1:-1]
    beside = [segment[1 + y : 47 + y, 1 + x : 63 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)]
    inside = (middle >= 0) & np.logical_and.reduce([middle == other for other in beside])  # blends lie at borders
    assert inside.mean() > 0.1
    cell = np.rint(shown[1:-1, 1:-1][inside])
    assert abs(shown[1:-1, 1:-1][inside] - cell).max() < 0.4
    assert (cell % 4 == made.targets.labels[middle[inside]]).all()
    assert len(set(zip(cell, middle[inside], strict=True))) == len(set(middle[inside]))  # one cell a segment


@pytest.mark.parametrize("size", [(1, 1), (7, 160), (61, 80), (119, 159), (60, 300), (200, 20)])
@pytest.mark.parametrize("writeable", [True, False])
def test_shrinking_is_pillows(size, writeable):
    """Which the paper's code resizes by: all pixels in reach count, so nothing is skipped; OpenCV's bilinear skips."""
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    image.flags.writeable = writeable
    window = Window(0, 0, 120, 160, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = resize_part(image, window)
    wanted = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    assert made.shape == (*size, 3) and made.flags.c_contiguous
    assert abs(made.astype(int) - wanted).max() <= 1
    part = resize_part(image, Window(20, 30, 100, 150, 40, 60))
    wanted = np.asarray(Image.fromarray(image[20:100, 30:150]).resize((60, 40), Image.Resampling.BILINEAR))
    assert abs(part.astype(int) - wanted).max() <= 1


def test_only_the_window_is_resized_and_it_is_what_the_whole_would_show():
    sample = picture(300, 400)
    generator = np.random.default_rng(5)
    for _ in range(20):
        window = draw_window(300, 400, [64, 64], [0.5, 2.0], generator)
        assert 0 <= window.top < window.bottom <= 300 and 0 <= window.left < window.right <= 400
        assert (window.height, window.width) == (64, 64) or min(window.height, window.width) < 64
        part = resize_map(sample.stored_map, window)[0]
        rows = window.top + (np.arange(window.height) + 0.5) * (window.bottom - window.top) / window.height
        columns = window.left + (np.arange(window.width) + 0.5) * (window.right - window.left) / window.width
        whole = sample.stored_map[0][rows.astype(int)][:, columns.astype(int)]
        assert (part == whole).mean() > 0.9  # pixel centres that fall on a border go either way
        assert resize_part(sample.image, window).shape == (window.height, window.width, 3)


def test_scales_cover_their_range_and_very_long_images_are_bounded():
    generator = np.random.default_rng(0)
    shares = [
        (w.bottom - w.top) / 600 for w in (draw_window(600, 800, [60, 60], [0.5, 2.0], generator) for _ in range(300))
    ]
    assert min(shares) < 0.53 and max(shares) == 1.0  # at 2.0 half of the shorter side shows, at 0.5 all of it
    window = draw_window(10, 10_000, [64, 64], [0.5, 2.0], generator)
    assert (window.height, window.width) == (1, 64)


def test_the_longest_side_of_every_published_recipe():
    """A strip of 1 : 100 meets it: 2048 on ADE20K, 2560 on COCO-Stuff-10k, 4096 on Cityscapes, 8192 on Mapillary."""
    recipes = {2048: ([512, 512], 2.0), 2560: ([640, 640], 1.5), 4096: ([512, 1024], 4.0), 8192: ([1280, 1280], 3.2)}
    for longest, (crop, largest) in recipes.items():
        window = draw_window(1000, 100_000, crop, [largest, largest], np.random.default_rng(0))
        assert window.height == round(longest / 100) and window.width == crop[1]


sides = st.integers(1, 3000)
NO_LIMIT = [10**6, 10**6]


@settings(max_examples=200)
@given(sides, sides, st.integers(64, 1400), st.integers(64, 1400), st.integers(0, 2**32))
def test_laws_of_the_detr_window(height, width, crop_height, crop_width, seed):
    window = draw_detr_window(height, width, [crop_height, crop_width], np.random.default_rng(seed))
    assert 0 <= window.top < window.bottom <= height and 0 <= window.left < window.right <= width
    assert 1 <= window.height <= crop_height and 1 <= window.width <= crop_width
    whole = draw_detr_window(height, width, NO_LIMIT, np.random.default_rng(seed))
    spans = ("top", "left", "bottom", "right")
    assert [getattr(whole, s) for s in spans] == [
        getattr(window, s) for s in spans
    ]  # the canvas changes the size alone
    assert max(whole.height, whole.width) <= 1333
    assert min(whole.height, whole.width) in DETR_SHORTER or max(whole.height, whole.width) == 1333
    fits = whole.height <= crop_height and whole.width <= crop_width
    factor = 1.0 if fits else min(crop_height / whole.height, crop_width / whole.width)
    assert abs(window.height - whole.height * factor) <= 1 and abs(window.width - whole.width * factor) <= 1


def test_detr_draws_what_the_published_mapper_draws():
    """On a 480 x 640 image: every size equally often, half of the windows crops of 384 to 600 of a resized image."""
    windows = [draw_detr_window(480, 640, NO_LIMIT, np.random.default_rng(i)) for i in range(4000)]
    shorter = np.array([min(w.height, w.width) for w in windows])
    counts = [int((shorter == size).sum()) for size in range(480, 801, 32)]
    assert sum(counts) == 4000 and min(counts) > 280 and max(counts) < 450  # 364 each on average
    cropped = [w for w in windows if (w.bottom - w.top, w.right - w.left) != (480, 640)]
    assert 0.45 < len(cropped) / 4000 < 0.55
    kept = np.array([[w.bottom - w.top, w.right - w.left] for w in cropped])
    # resized to 600 the image is 600 x 800: a crop of 384 shows 307 of its 480 rows, and of its 640 columns
    assert 306 <= kept[:, 0].min() <= 309 and kept[:, 0].max() == 480
    assert 306 <= kept[:, 1].min() <= 309 and kept[:, 1].max() == 640  # of 533 columns at 400 all may stay
    for w in cropped:
        assert (
            abs(w.height / w.width - (w.bottom - w.top) / (w.right - w.left)) < 0.02 or max(w.height, w.width) == 1333
        )


def test_the_configuration_chooses_between_scale_and_detr():
    """On a canvas of 1400 nothing is scaled down: the shorter side is one of DETR's, the rest is padding."""
    everything = TargetRules("panoptic", np.ones(4, bool), "none", "none")
    config = small_config(crop=[1400, 1400], color=False, resize="detr")
    made = training_sample(picture(96, 128), config, everything, sample_generator(0, 5))
    seen = made.targets.segment_map[0] != IGNORE
    size = int(seen.any(axis=1).sum()), int(seen.any(axis=0).sum())
    window = draw_detr_window(96, 128, [1400, 1400], sample_generator(0, 5))
    assert size == (window.height, window.width) and min(size) in DETR_SHORTER
    scaled = training_sample(picture(96, 128), small_config(crop=[64, 64]), everything, sample_generator(0, 5))
    assert (scaled.targets.segment_map >= 0).all()


def test_a_changed_scale_is_refused_with_detr():
    validate(load_config(None, ["data.resize=detr"]))
    with pytest.raises(UserError, match=r"data.scale = \[0.5, 1.5\] does nothing with data.resize = detr"):
        validate(load_config(None, ["data.resize=detr", "data.scale=[0.5,1.5]"]))


def test_a_sample_depends_on_seed_and_position_alone():
    sample, config, rule = picture(90, 120), small_config(), rules()
    first = training_sample(sample, config, rule, sample_generator(3, 10**12))
    again = training_sample(sample, config, rule, sample_generator(3, 10**12))
    assert (first.image == again.image).all() and (first.targets.segment_map == again.targets.segment_map).all()
    others = [
        training_sample(sample, config, rule, sample_generator(*at)).image for at in ((3, 11), (4, 10**12), (-1, 11))
    ]
    assert all((first.image != other).any() for other in others)


def test_colour_jitter_moves_every_property_and_only_sometimes():
    image = np.full((8, 8, 3), (120, 60, 30), np.uint8)
    results = [
        apply_color(image, draw_color(np.random.default_rng(i))).reshape(-1, 3)[0].astype(int) for i in range(300)
    ]
    same = sum((r == image[0, 0]).all() for r in results)
    assert 8 <= same <= 50  # 300 / 2^4 on average, and roundings that end where they began
    brightness = np.array([r.max() for r in results])
    assert brightness.min() < 60 and brightness.max() > 180
    assert {tuple(np.argsort(r)) for r in results} > {(2, 1, 0)}  # hue turns the order of the channels
    assert (image == (120, 60, 30)).all()


def test_fitting_shows_the_whole_image():
    sample = picture(120, 160)
    made = fitted_sample(sample, [64, 64], TargetRules("panoptic", np.ones(4, bool), "none", "none"))
    assert len(made.targets.labels) == 64 and made.targets.dropped == 0
    assert (made.targets.segment_map[0, 48:] == IGNORE).all() and (made.targets.segment_map[0, :48] >= 0).all()
    assert (made.image[:, 48:] == PAD).all()
    small = fitted_sample(picture(8, 16), [64, 64], TargetRules("panoptic", np.ones(4, bool), "none", "none"))
    assert (small.targets.segment_map[0, :32] >= 0).all() and (small.targets.segment_map[0, 32:] == IGNORE).all()


def test_collate_join_and_cut():
    samples = [training_sample(picture(90, 120), small_config(), rules(), sample_generator(0, i)) for i in range(5)]
    whole = collate(samples, "abcde", [{"event": "quarantine", "key": "x"}])
    parts = join([collate(samples[:2], "ab", [{"event": "quarantine", "key": "x"}]), collate(samples[2:], "cde")])
    assert parts.keys == whole.keys == list("abcde") and parts.events == whole.events and len(whole) == 5
    assert whole.events[1]["count"] == sum(s.targets.dropped for s in samples)
    for name in ("images", "segment_map", "labels", "segment_layer"):
        assert (getattr(parts, name) == getattr(whole, name)).all()
    counts = [len(s.targets.labels) for s in samples]
    assert whole.labels.shape[1] == max(counts)
    assert [(row != NO_LABEL).sum().item() for row in whole.labels] == counts
    middle = cut(whole, 1, 3)
    assert middle.keys == ["b", "c"] and middle.events == [] and (middle.images == whole.images[1:3]).all()
    assert cut(whole, 0, 1).events == whole.events
    empty = collate([blank_sample([32, 32])], [""])
    assert empty.labels.tolist() == [[NO_LABEL]] and (empty.segment_map == IGNORE).all() and empty.events == []
