"""MATLAB files: one matrix of numbers out of a file nobody vouches for.

Read here, not with scipy, whose reader crashes on some broken files. Of format 5 (MATLAB 5 to 7) only what a matrix
of numbers needs is understood: https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf. Structs, cells and
objects are passed over.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.encode import MAX_PIXELS
from data_tools.record import BadRecord

HEADER, TAG = 128, 8
"""Bytes before the first element, and of an element's tag (or of a small element)."""
ORDERS = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
"""Byte order of the files whose header ends in these bytes: a version and a mark."""
MATRIX, COMPRESSED = 14, 15
"""Types of an element that hold others."""
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""Types of an element that hold numbers, as numpy calls them."""
DOUBLE, UINT64, COMPLEX = 6, 15, 0x0800
"""First and last class of matrices of numbers; flag of a complex one."""
LARGEST = (1 << 16) - 1
"""Value of a class that other label maps have room for as well."""
LIMIT = 1 << 28
"""An element that unpacks to more bytes is refused."""


def read_matrix(path: Path, name: str) -> np.ndarray:
    """Variable `name` of a MATLAB 5 file, whole numbers, uint16 [H,W]. Raises BadRecord."""
    try:
        data = path.read_bytes()
        order = ORDERS.get(data[HEADER - 4 : HEADER])
        if order is None:
            raise BadRecord("files that are not MATLAB files of version 5 to 7")
        for kind, content in list(_elements(data[HEADER:], order)):  # all, so that a file cut short is seen
            unpacked = _elements(_unpack(content), order) if kind == COMPRESSED else iter([(kind, content)])
            for inner, matrix in unpacked:
                if inner == MATRIX and (values := _matrix(matrix, name, order)) is not None:
                    return _whole(values, name)
    except (OSError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise BadRecord(f"MATLAB files that cannot be read ({type(error).__name__})") from error
    raise BadRecord(f"MATLAB files without the variable {name}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of each element; BadRecord where the data end inside one."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        small = kind >> 16
        start = at + TAG
        if small:
            kind, size, start = kind & 0xFFFF, small, at + 4
        if start + size > len(data):
            raise BadRecord("MATLAB files that are cut short")
        yield kind, data[start : start + size]
        at = at + TAG if small else start + (size if kind == COMPRESSED else -(-size // TAG) * TAG)


def _unpack(packed: bytes) -> bytes:
    unpack = zlib.decompressobj()
    data = unpack.decompress(packed, LIMIT)
    if unpack.unconsumed_tail:
        raise BadRecord(f"MATLAB files that unpack to more than {LIMIT >> 20} MiB")
    if not unpack.eof:
        raise BadRecord("MATLAB files that are cut short")
    return data


def _matrix(content: bytes, wanted: str, order: str) -> np.ndarray | None:
    """Numbers [H,W] of a variable, None where it has another name; BadRecord where it is no matrix of numbers."""
    elements = _elements(content, order)
    (_, flags), (_, shape), (_, name) = (next(elements, (0, b"")) for _ in range(3))
    if name != wanted.encode():
        return None
    flag = struct.unpack_from(f"{order}I", flags)[0]
    size = np.frombuffer(shape, f"{order}i4")
    kind, numbers = next(elements, (0, b""))
    pixels = math.prod(size.tolist())
    if not DOUBLE <= flag & 0xFF <= UINT64 or flag & COMPLEX or kind not in NUMBERS or len(size) != 2:
        raise BadRecord(f"MATLAB files whose {wanted} is not a matrix of numbers")
    if not 0 < pixels <= MAX_PIXELS or size.min() < 0:
        raise BadRecord(f"MATLAB files whose {wanted} is empty or larger than {MAX_PIXELS} pixels")
    return np.frombuffer(numbers, order + NUMBERS[kind]).reshape(size, order="F")


def _whole(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > LARGEST or (values % 1).any():
        raise BadRecord(f"MATLAB files whose {name} holds something else than whole numbers from 0 to {LARGEST}")
    return values.astype(np.uint16)
