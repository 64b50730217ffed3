"""Fast paths and plain statements of what they do: a sample out of a tar, maps, geometry and colour."""

from __future__ import annotations

import io
import tarfile
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.encode import encode_map
from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.color import draw_color
from mf_scale.data.decode import StoredSample, decode_map, none_value, plain_map
from mf_scale.data.samples import BadSample, members_by_webdataset, parse_sample, plain_members
from mf_scale.data.targets import TargetRules, look_up, make_targets, present_values
from mf_scale.data.transforms import PAD, draw_window, fitted_sample, resize_part, sample_generator, training_sample
from tests.sources import sample_members, small_config

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE)
names = st.sampled_from(
    [
        "k",
        "dir/k",
        "__a__/k",
        "./k",
        "__k",
        "a.b/k",
        "k.x",
        ".k",
        "dir/.k",
        "Größe",
        "図",
        "k\n",
        "d" * 60 + "/" + "k" * 60,
        "",
    ]
)
suffixes = st.sampled_from(["jpg", "JPG", "seg.png", "json", "a.b.c", "__x__", "__key__", "a/b", "", "été", "j" * 99])


def tar_of(members: list[tuple[str, bytes, bytes]], form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as file:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def by_webdataset(data: bytes, key: str) -> dict[str, bytes] | None:
    try:
        return members_by_webdataset(data, key)
    except BadSample:
        return None


@settings(max_examples=400, deadline=None)
@given(
    key=names,
    others=st.lists(names, max_size=1),
    parts=st.lists(st.tuples(suffixes, st.binary(max_size=1100)), min_size=1, max_size=4),
    kind=st.sampled_from(KINDS),
    odd=st.integers(0, 6),
    form=st.sampled_from(FORMATS),
    change=st.none() | st.tuples(st.integers(0, 1200), st.integers(0, 255)),
    kept=st.integers(0, 12000),
)
@example("k", [], [("jpg", b"x"), ("jpg", b"y")], KINDS[0], 6, FORMATS[0], None, 12000)  # a member stands twice
@example("k", ["dir/k"], [("jpg", b"x")], KINDS[0], 6, FORMATS[0], None, 12000)  # of another sample
@example("k", [], [("jpg", b"x")], KINDS[2], 0, FORMATS[0], None, 12000)  # a link
@example("k", [], [("jpg", b"x" * 700)], KINDS[0], 6, FORMATS[0], None, 1030)  # it ends inside its member
@example("k", [], [("jpg", b"x")], KINDS[0], 6, FORMATS[0], (130, ord("7")), 12000)  # a size that the checksum denies
@example("k", [], [("JPG", b"x")], KINDS[0], 6, FORMATS[0], None, 12000)
@example("k", [], [("jpg", b"x"), ("a/b", b"y")], KINDS[0], 6, FORMATS[0], None, 12000)
@example("__a__/k", [], [("jpg", b"x")], KINDS[0], 6, FORMATS[0], None, 12000)
def test_a_sample_is_taken_from_a_tar_as_webdataset_does(key, others, parts, kind, odd, form, change, kept):
    members = [(f"{key}.{suffix}", data, KINDS[0]) for suffix, data in parts]
    members += [(f"{other}.txt", b"", KINDS[0]) for other in others]
    members = [
        (name, data if i != odd else b"", kind if i == odd else was) for i, (name, data, was) in enumerate(members)
    ]
    try:
        data = bytearray(tar_of(members, form))
    except ValueError:  # ustar has no place for such a name
        assume(False)
    if change:
        data[change[0] % len(data)] = change[1]
    found = plain_members(bytes(data[:kept]), key)
    assert found is None or found == by_webdataset(bytes(data[:kept]), key)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("key", ["k", "dir/k", "./a.b/k", "Größe-図"])
def test_ordinary_samples_take_the_fast_path(form, key):
    members = [
        (f"{key}.{name}", data, KINDS[0]) for name, data in sample_members(0, key).items() if isinstance(data, bytes)
    ]
    data = tar_of(members, form)
    expected_fast = form != tarfile.PAX_FORMAT or key.isascii()  # PAX puts what is not ASCII into headers of its own
    assert (plain_members(data, key) is not None) == expected_fast
    assert parse_sample(data, key).image == members[0][1]
    assert by_webdataset(data, key) == {name[len(key) + 1 :]: content for name, content, _ in members}


@pytest.mark.parametrize("name", ["k.jpg", "../k.jpg", "/k.jpg", "a/../k.jpg", "a\\k.jpg"])
def test_names_that_leave_the_shard_are_refused_on_both_paths(name):
    key, data = name[:-4], tar_of([(name, b"x", KINDS[0])], tarfile.USTAR_FORMAT)
    if name == "k.jpg":
        assert plain_members(data, key) == members_by_webdataset(data, key) == {"jpg": b"x"}
        return
    for way in (parse_sample, members_by_webdataset):
        with pytest.raises(BadSample, match="leaves the shard"):
            way(data, key)


def test_a_folder_in_the_headers_prefix_is_part_of_the_key():
    folder = "d" * 99
    data = tar_of([(f"{folder}/k.jpg", b"x", KINDS[0])], tarfile.USTAR_FORMAT)
    assert plain_members(data, "k") is None and by_webdataset(data, "k") is None
    assert by_webdataset(data, f"{folder}/k") == {"jpg": b"x"}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([np.uint8, np.uint16]))
def test_maps_decode_as_pillow_decodes_them(height, width, seed, dtype):
    stored = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (height, width), dtype)
    for png in (encode_map(stored), cv2.imencode(".png", stored)[1].tobytes()):
        assert (decode_map(png, (height, width)) == stored).all()
        assert (np.asarray(Image.open(io.BytesIO(png))) == stored).all()
    assert (plain_map(encode_map(stored), (height, width)) is None) == (dtype is np.uint16)


@pytest.mark.parametrize(("rows", "cut"), [(8, 0), (10, 0), (9, 4)], ids=["a row short", "a row more", "its sum cut"])
def test_pixels_that_are_not_all_there_are_left_to_pillow(rows, cut):
    whole = encode_map(np.zeros((9, 11), np.uint8))
    pixels = zlib.compress(bytes(rows * 12))
    pixels = pixels[: len(pixels) - cut]
    png = whole[:33] + len(pixels).to_bytes(4, "big") + b"IDAT" + pixels + bytes(4) + whole[-12:]
    assert plain_map(png, (9, 11)) is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_or_cut_map_is_never_taken_for_another(data):
    stored = np.random.default_rng(0).integers(0, 5, (9, 11), np.uint8)
    png = bytearray(encode_map(stored))
    at, value = data.draw(st.integers(0, len(png) - 1)), data.draw(st.integers(0, 255))
    png[at] = value
    found = plain_map(bytes(png[: data.draw(st.integers(0, len(png)))]), (9, 11))
    assert found is None or (found == stored).all()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32), st.sampled_from([4, 256, 9999])
)
def test_present_values_and_look_up_are_those_of_numpy(layers, height, width, seed, values):
    dtype = np.uint8 if values <= 256 else np.uint16
    generator = np.random.default_rng(seed)
    stored = generator.integers(0, values, (layers, height, width), dtype)
    table = generator.integers(-2, 300, np.iinfo(dtype).max + 1).astype(np.int16)
    assert (look_up(table, stored) == table[stored]).all() and look_up(table, stored).dtype == np.int16
    assert np.flatnonzero(present_values(stored)).tolist() == np.unique(stored).tolist()


def plain_training_sample(sample, config, rules, generator):
    """The same on the whole crop, one operation after the other, tables by indexing."""
    window = draw_window(sample.image.shape[0], sample.image.shape[1], config.crop, config.scale, generator)
    flip = generator.random() < config.flip
    tables = draw_color(generator)
    image = resize_part(sample.image, window)
    if tables.before is not None:
        image = tables.before[image]
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    if tables.hue is not None:
        hsv[..., 0] = tables.hue[hsv[..., 0]]
    if tables.saturation is not None:
        hsv[..., 1] = tables.saturation[hsv[..., 1]]
    if tables.hue is not None or tables.saturation is not None:
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if tables.after is not None:
        image = tables.after[image]
    part = sample.stored_map[:, window.top : window.bottom, window.left : window.right]
    size = (window.width, window.height)
    maps = np.stack([cv2.resize(layer, size, interpolation=cv2.INTER_NEAREST_EXACT) for layer in part])
    if flip:
        image, maps = image[:, ::-1], maps[:, :, ::-1]
    none = none_value(maps.dtype)
    canvas = np.full((*config.crop, 3), PAD, np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    padded = np.full((len(maps), *config.crop), none, maps.dtype)
    padded[0] = none + 1
    padded[:, : image.shape[0], : image.shape[1]] = maps
    return canvas.transpose(2, 0, 1), make_targets(padded, sample, rules)


@settings(max_examples=150, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.tuples(st.integers(1, 150), st.integers(1, 70)),
    layers=st.integers(1, 2),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    task=st.sampled_from(["panoptic", "semantic", "instance"]),
    treatment=st.sampled_from(["none", "ignore"]),
    seed=st.integers(0, 2**32),
)
@example((1, 1), (150, 70), 1, np.uint8, "panoptic", "none", 0)
def test_a_training_sample_is_that_of_the_plain_way(sides, crop, layers, dtype, task, treatment, seed):
    generator = np.random.default_rng(seed)
    top = none_value(np.dtype(dtype))
    values = np.array([*range(6), top, top + 1], dtype)
    sample = StoredSample(
        "k",
        generator.integers(0, 256, (*sides, 3), np.uint8),
        values[generator.integers(0, 8, (layers, *sides))],
        generator.integers(0, 4, 6),
        np.zeros(6, np.int64),
        generator.random(6) < 0.3,
    )
    rules = TargetRules(task, np.array([True, True, False, False]), treatment, treatment)
    config = small_config(crop=list(crop))
    made = training_sample(sample, config, rules, sample_generator(seed, 7))
    image, targets = plain_training_sample(sample, config, rules, sample_generator(seed, 7))
    assert (made.image == image).all() and made.image.flags.c_contiguous
    for name in ("segment_map", "labels", "segment_layer", "crowd", "dropped"):
        assert np.array_equal(getattr(made.targets, name), getattr(targets, name)), name
    assert made.targets.segment_map.shape == (1 if task == "semantic" else layers, *crop)


def test_padding_of_several_layers_is_ignored_once():
    sample = StoredSample(
        "k",
        np.zeros((4, 8, 3), np.uint8),
        np.zeros((2, 4, 8), np.uint8),
        np.zeros(1, int),
        np.zeros(1, int),
        np.zeros(1, bool),
    )
    made = fitted_sample(sample, [8, 8], TargetRules("panoptic", np.array([True]), "ignore", "ignore"))
    assert (made.targets.segment_map[0, 4:] == IGNORE).all() and (made.targets.segment_map[1, 4:] == NONE).all()
