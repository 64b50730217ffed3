"""Members -> image and map: strict, and safe with hostile shards."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_tools.encode import encode_map, stored_values
from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.decode import decode_image, decode_map, decode_sample
from mf_scale.data.samples import BadSample, RawSample, parse_sample
from tests.sources import jpeg, sample_members


def raw(number: int = 0, **changes) -> RawSample:
    members = sample_members(number, "k")
    values = {"image": members["jpg"], "maps": [members["seg.png"]], "meta": json.loads(members["json"])}
    return RawSample("k", **{**values, **changes})


def tar(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def encoded(mode: str, form: str = "JPEG") -> bytes:
    image = Image.open(io.BytesIO(jpeg(3, 24, 32))).convert(mode)
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP")]
)
def test_every_kind_of_image_becomes_rgb(mode, form):
    image = decode_image(encoded(mode, form), 10_000, (24, 32))
    assert image.shape == (24, 32, 3) and image.dtype == np.uint8 and image.std() > 5


def test_pixel_limit_is_read_in_the_header():
    data = encoded("RGB")
    header = data[: data.index(b"\xff\xda") + 20]  # no pixel could be decoded from this
    with pytest.raises(BadSample, match="above the limit of 767"):
        decode_image(header, 767)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_maps_come_back(dtype):
    segments = 3 if dtype == np.uint8 else 300
    segment_map = np.random.default_rng(0).integers(-2, segments, (20, 30)).astype(np.int32)
    stored = stored_values(segment_map, segments)
    assert stored.dtype == dtype
    back = decode_map(encode_map(stored), (20, 30))
    assert back.dtype == dtype and (back == stored).all()
    top = np.iinfo(dtype).max
    assert (back[segment_map == NONE] == top - 1).all() and (back[segment_map == IGNORE] == top).all()


def test_254_segments_fit_eight_bits_and_255_do_not():
    assert stored_values(np.zeros((1, 1), np.int32), 254).dtype == np.uint8
    assert stored_values(np.zeros((1, 1), np.int32), 255).dtype == np.uint16


def meta(**changes) -> dict:
    return {**json.loads(sample_members(0, "k")["json"]), **changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": sample_members(0, "k")["jpg"][:500]}, "image does not decode"),
        ({"image": b""}, "image does not decode"),
        ({"image": jpeg(0, 40, 48)}, "image is 48x40, its json says 56x40"),
        ({"maps": [sample_members(0, "k")["seg.png"][:60]]}, "segment map does not decode"),
        ({"maps": [sample_members(1, "k")["seg.png"]]}, "segment map has 56x48 pixels"),
        ({"maps": [encoded("RGB", "PNG")]}, "segment map"),
        ({"meta": meta(segments=[])}, "a segment that its json does not list"),
        ({"meta": meta(segments=[{"label": 6, "layer": 0, "crowd": False}])}, "label 6 is outside the vocabulary of 6"),
        ({"meta": meta(segments=[{"label": 0, "layer": 1, "crowd": False}])}, "a layer that is not there"),
        ({"meta": meta(segments=[{"label": 0}])}, "lacks a field"),
        ({"meta": {}}, "lacks a field"),
        ({"meta": meta(height=float("inf"))}, "lacks a field or has a wrong one: OverflowError"),
        ({"meta": meta(segments=[{"label": 10**30, "layer": 0, "crowd": False}])}, "OverflowError"),
    ],
)
def test_whatever_is_wrong_is_named(change, said):
    with pytest.raises(BadSample, match=said):
        decode_sample(raw(**change), 6, 1 << 20)


def test_a_map_of_more_segments_than_eight_bits_hold_is_checked_too():
    many = [{"label": 0, "layer": 0, "crowd": False}] * 300
    wide = np.full((1, 40, 56), 299, np.int32)
    png = encode_map(stored_values(wide, 300)[0])
    assert decode_sample(raw(maps=[png], meta=meta(segments=many)), 6, 1 << 20).stored_map.max() == 299
    with pytest.raises(BadSample, match=r"does not list \(299 segments\)"):
        decode_sample(raw(maps=[png], meta=meta(segments=many[1:])), 6, 1 << 20)


def test_a_sound_sample_decodes():
    sample = decode_sample(raw(2), 6, 1 << 20)
    assert sample.image.shape == (56, 56, 3) and sample.stored_map.shape == (1, 56, 56)
    assert sample.labels.tolist() == [4, 2, 3, 2] and sample.crowd.tolist() == [False, False, False, True]


def good_members(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{name}", data) for name, data in sample_members(0, key).items() if isinstance(data, bytes)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (tar(("/abs.jpg", b"x")), "leaves the shard"),
        (tar(("a/../../b.jpg", b"x")), "leaves the shard"),
        (tar(("k.jpg", b"x"), ("k.jpg", b"y")), "duplicate"),
        (tar(("k.jpg", b"x")), "one image and one json"),
        (tar(*good_members("other")), "hold the samples"),
        (tar(*good_members("k"), *good_members("l")), "hold the samples"),
        (tar(("k.json", b"{}"), ("k.jpg", b"x"), ("k.seg1.png", b"")), "has the layers"),
        (tar(("k.json", b"[]"), ("k.jpg", b"x")), "not an object"),
        (tar(("k.json", b"[" * 100_000), ("k.jpg", b"x")), "json cannot be read"),
        (b"no tar at all" * 100, "cannot be read"),
    ],
)
def test_broken_members_are_bad_samples(data, said):
    with pytest.raises(BadSample, match=said):
        parse_sample(data, "k")


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "touched").touch, ()

    data = tar(*good_members("k"), ("k.pyd", pickle.dumps(Evil())), ("k.pth", pickle.dumps(Evil())))
    assert parse_sample(data, "k").key == "k"
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(("listed", "fits"), [(254, True), (255, False), (256, False), (300, False)])
def test_more_segments_than_the_depth_of_the_map_holds_are_refused(listed, fits):
    """NONE and IGNORE would be taken for segments."""
    sample = raw()
    segments = [{"label": i % 6, "layer": 0, "crowd": False} for i in range(listed)]
    many = raw(meta={**sample.meta, "segments": segments})
    if fits:
        assert len(decode_sample(many, 6, 10_000).labels) == listed
        return
    with pytest.raises(BadSample, match=f"lists {listed} segments, a map of 8 bits holds 254 at most"):
        decode_sample(many, 6, 10_000)


def test_more_segments_than_a_batch_can_number_are_refused():
    sample = raw()
    deep = encode_map(np.zeros((sample.meta["height"], sample.meta["width"]), np.uint16))
    segments = [{"label": 0, "layer": 0, "crowd": False}] * 40_000
    with pytest.raises(BadSample, match="a map of 16 bits holds 32768 at most"):
        decode_sample(raw(maps=[deep], meta={**sample.meta, "segments": segments}), 6, 10_000)


def test_what_is_no_image_is_said_without_an_address_in_memory():
    for data in (b"", b"GIF89a" + bytes(40)):
        with pytest.raises(BadSample, match="of no kind that is read"):
            decode_image(data, 10_000)
    with pytest.raises(BadSample, match="segment map does not decode: it is of no kind that is read"):
        decode_map(b"no png", (4, 4))
