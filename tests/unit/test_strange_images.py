"""Images as they come: every kind that decodes becomes RGB, everything else is named, nothing large is begun."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mf_scale.data.decode import decode_image, decode_map
from mf_scale.data.samples import BadSample
from tests.sources import jpeg

PHOTOS = sorted(Path(__file__, "../../../data_tools/sample").resolve().glob("coco_*/val/*.jpg"))
LIMIT = 1 << 20
NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
DEEP = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 85


def saved(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def photo(height: int = 24, width: int = 32) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(3, height, width)))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(height: int, width: int, *chunks: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def jpeg_header(height: int, width: int) -> bytes:
    """A JPEG up to its first scan, of any size."""
    data = bytearray(saved(photo(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data[: data.index(b"\xff\xda") + 14])


@pytest.mark.parametrize("path", PHOTOS[::8], ids=lambda path: path.name)
def test_real_photos_have_pillows_pixels(path):
    data = path.read_bytes()
    assert np.abs(decode_image(data, LIMIT).astype(int) - by_pillow(data)).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}, {"quality": 5}])
@pytest.mark.parametrize("size", [(24, 32), (1, 1), (7, 1), (17, 33)])
def test_every_jpeg_has_pillows_pixels(mode, options, size):
    data = saved(photo(*size).convert(mode), "JPEG", **options)
    image = decode_image(data, LIMIT, size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - by_pillow(data)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA"])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize("size", [(24, 32), (1, 1)])
@pytest.mark.filterwarnings("error")
def test_alpha_is_dropped_and_palettes_are_looked_up(mode, form, size):
    image = photo(*size).convert("RGBA")
    image.putalpha(Image.fromarray(np.random.default_rng(1).integers(1, 256, size, np.uint8)))
    written = {"PA": "RGBA"}.get(mode, mode) if form == "PNG" else ("RGBA" if "A" in mode else "RGB")
    image = image.convert(written)
    data = saved(image, form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    assert (decode_image(data, LIMIT, size) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_scaled_not_clipped(channels):
    deep = DEEP if channels == 1 else np.stack([DEEP] * channels, axis=-1)
    image = decode_image(cv2.imencode(".png", deep)[1].tobytes(), LIMIT, (24, 32))
    assert (image == (DEEP >> 8)[..., None]).all() and image.shape == (24, 32, 3)
    assert image.max() == 254 and len(np.unique(image)) > 200


def test_exif_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees; the annotation is not
    data = saved(photo(), "JPEG", exif=exif)
    assert (decode_image(data, LIMIT, (24, 32)) == by_pillow(data)).all()


@pytest.mark.parametrize("behind", [b"\0" * 100, b"junk" * 999, saved(photo(), "JPEG")])
def test_junk_behind_an_image_is_left_alone(behind):
    data = saved(photo(), "JPEG")
    assert (decode_image(data + behind, LIMIT, (24, 32)) == by_pillow(data)).all()


def test_what_libjpeg_forgives_decodes_as_pillow_decodes_it():
    data = saved(photo(), "JPEG")
    data = data[:-2] + b"extraneous" + data[-2:]
    assert (decode_image(data, LIMIT, (24, 32)) == by_pillow(data)).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_whatever_is_cut_is_refused(form):
    data = saved(photo(), form)
    for kept in (*range(0, len(data) - 30, 37), len(data) - 30):
        with pytest.raises(BadSample, match="image does not decode"):
            decode_image(data[:kept], LIMIT, (24, 32))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 700), st.binary(min_size=1, max_size=9))
def test_changed_bytes_give_an_image_or_a_reason(form, at, changed):
    data = bytearray(saved(photo(), form))
    data[at : at + len(changed)] = changed
    try:
        assert decode_image(bytes(data), LIMIT).dtype == np.uint8
    except BadSample as bad:
        assert "image" in str(bad)


@pytest.mark.parametrize("data", [jpeg_header(20_000, 20_000), png(20_000, 20_000), png(9_999, 9_999, colour=2)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_of_too_many_pixels_is_all_that_is_read(data):
    tracemalloc.start()
    try:
        with pytest.raises(BadSample, match=r"above the limit of|exceeds limit of"):
            decode_image(data, 89_478_485)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n", b"<svg/>" * 50])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(BadSample, match="image does not decode"):
        decode_image(data, LIMIT)


def bombs() -> list[bytes]:
    zeros = zlib.compress(bytes(64 << 20), 9)
    rows = chunk(b"IDAT", zlib.compress(bytes(9 * 10)))
    text = chunk(b"zTXt", b"k\0\0" + zeros)
    return [png(9, 9, chunk(b"IDAT", zeros)), png(9, 9, text, rows), png(9, 9, rows, text)]


@pytest.mark.parametrize("bomb", bombs(), ids=["pixels", "text before", "text behind"])
def test_a_small_file_that_inflates_is_not_inflated(bomb):
    tracemalloc.start()
    try:
        for decode in (decode_image, lambda data, _: decode_map(data, (9, 9))):
            try:
                assert decode(bomb, LIMIT).shape[:2] == (9, 9)
            except BadSample as bad:
                assert "does not decode" in str(bad)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("depth", "row", "values"),
    [(1, b"\x1b", [0, 0, 0, 1, 1, 0, 1, 1]), (2, b"\x1b", [0, 1, 2, 3]), (4, b"\x12\x3f", [1, 2, 3, 15])],
)
@pytest.mark.parametrize("colour", [0, 3], ids=["grey", "palette"])
def test_maps_of_few_bits_keep_their_values(depth, row, values, colour):
    palette = [chunk(b"PLTE", bytes(range(3 << depth)))] if colour == 3 else []
    data = png(1, len(values), *palette, chunk(b"IDAT", zlib.compress(b"\0" + row)), depth=depth, colour=colour)
    assert decode_map(data, (1, len(values))).tolist() == [values]


def test_maps_of_colours_are_refused():
    with pytest.raises(BadSample, match="PNG of mode RGB, not grey"):
        decode_map(saved(photo(), "PNG"), (24, 32))
