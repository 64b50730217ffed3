"""Pages: bytes followed by a crc32 of each page, so that a part of a file is checked without reading the rest."""

from __future__ import annotations

import os
import zlib
from array import array

PAGE = 64 << 10
"""Bytes behind one checksum."""
WIDTH = 4
"""Bytes of a checksum."""


def file_size(length: int) -> int:
    """Bytes of a file that holds `length` bytes with their checksums."""
    return length + WIDTH * -(-length // PAGE)


def with_checksums(data: bytes, name: str) -> bytes:
    """The content of a file for `data`; `name` goes into the checksums, so a file under another name is wrong."""
    return data + _checksums(data, name).tobytes()


def read_pages(descriptor: int, length: int, start: int, stop: int, name: str) -> bytes | None:
    """Bytes start..stop of the `length` in an open file; None where its size or a checksum is not what it should be."""
    if os.fstat(descriptor).st_size != file_size(length):
        return None
    first, end = start // PAGE, -(-stop // PAGE)
    data = os.pread(descriptor, min(end * PAGE, length) - first * PAGE, first * PAGE)
    expected = os.pread(descriptor, WIDTH * (end - first), length + WIDTH * first)
    if _checksums(data, name).tobytes() != expected:
        return None
    return data[start - first * PAGE : stop - first * PAGE]


def _checksums(data: bytes, name: str) -> array[int]:
    seed, view = zlib.crc32(name.encode()), memoryview(data)
    return array("I", (zlib.crc32(view[at : at + PAGE], seed) for at in range(0, len(data), PAGE)))
