"""Shapes: polygons and run lengths as COCO writes them -> masks, and masks that overlap -> layers of a segment map.

Annotation files are not trusted: pycocotools leaves pixels as they were in memory where run lengths do not add up, and
takes memory by the coordinates of a polygon, so run lengths are read here and coordinates checked.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_tools.formats.names import MALFORMED
from data_tools.record import BadRecord, RecordSegment
from mf_scale.data.batch import NONE
from mf_scale.errors import UserError

LEAST_NUMBERS = 6
"""Numbers of a polygon: three points."""
MOST_OUTLINE = 1 << 22
"""Pixels along a polygon; pycocotools takes 40 bytes for each."""
FEW_POINTS = "polygons of fewer than three points"
Window = tuple[slice, slice]
"""Rows and columns of a box in an image."""


def need_pycocotools(what: str) -> None:
    """UserError where pycocotools is not installed."""
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what} is read with pycocotools", remedy="pip install pycocotools") from error


@dataclass(frozen=True)
class Runs:
    """A mask as run lengths: little memory, whatever its size, until it is drawn."""

    lengths: np.ndarray
    """int64 [N]: of pixels outside and inside in turn, down the columns; they add up to the pixels of the image."""
    size: tuple[int, int]
    """Height and width of the image."""

    @property
    def area(self) -> int:
        """Pixels inside."""
        return int(self.lengths[1::2].sum())

    def window(self) -> Window:
        """The smallest box that holds every pixel inside, of which there must be one."""
        height = self.size[0]
        ends = np.cumsum(self.lengths)[1::2]
        lengths = self.lengths[1::2]
        ends, lengths = ends[lengths > 0], lengths[lengths > 0]
        first, last = ends - lengths, ends - 1
        columns = slice(int(first[0]) // height, int(last[-1]) // height + 1)
        if (first // height != last // height).any():  # from the foot of a column to the head of the next
            return slice(0, height), columns
        return slice(int((first % height).min()), int((last % height).max()) + 1), columns

    def inside(self, window: Window) -> np.ndarray:
        """The pixels inside within a box, bool [h,w]."""
        height, (rows, columns) = self.size[0], window
        edges = np.clip(np.append(0, np.cumsum(self.lengths)), columns.start * height, columns.stop * height)
        odd = np.arange(len(self.lengths)) % 2 == 1
        return np.repeat(odd, np.diff(edges)).reshape(-1, height).T[rows]


def draw(shape: Any, size: tuple[int, int]) -> np.ndarray:
    """A shape as `runs_of` takes it -> bool [H,W]. Raises BadRecord."""
    return runs_of(shape, size).inside((slice(0, size[0]), slice(0, size[1])))


def runs_of(shape: Any, size: tuple[int, int]) -> Runs:
    """Run lengths of polygons, or of run lengths packed or as a list; BadRecord for anything else."""
    try:
        if isinstance(shape, list):
            shape = _outline(shape, size)
        counts, stated = shape["counts"], tuple(int(n) for n in shape["size"])
        lengths = np.asarray(counts, np.int64) if isinstance(counts, list) else _unpack(counts)
    except MALFORMED as error:
        raise BadRecord("shapes that are neither polygons nor run lengths") from error
    if stated != size:
        raise BadRecord("masks whose size is not that of the image entry")
    pixels = size[0] * size[1]
    # Each by itself first: a sum of 64 bits that overflows may come out right.
    if lengths.ndim != 1 or (lengths < 0).any() or (lengths > pixels).any() or lengths.sum() != pixels:
        raise BadRecord("run lengths that do not add up to the size of the image")
    return Runs(lengths, size)


def short_polygons(shape: Any) -> int:
    """Polygons of a shape that have fewer than three points; they are not drawn."""
    return sum(len(polygon) < LEAST_NUMBERS for polygon in shape) if isinstance(shape, list) else 0


def _outline(polygons: list[Any], size: tuple[int, int]) -> dict[str, Any]:
    """Polygons -> run lengths of the pixels inside, as pycocotools draws them."""
    from pycocotools import mask as rle

    whole = [list(polygon) for polygon in polygons if len(polygon) >= LEAST_NUMBERS]
    for polygon in whole:
        points = np.asarray(polygon, np.float64)
        if points.ndim != 1 or len(points) % 2:
            raise BadRecord("polygons that are not pairs of numbers")
        sides = np.abs(np.diff(points.reshape(-1, 2), axis=0, append=points[None, :2])).max(axis=1)
        if not (np.abs(points) <= 2 * max(size)).all() or sides.sum() > MOST_OUTLINE:  # not a number is refused too
            raise BadRecord("polygons that reach far out of the image or cross it without end")
    if not whole:
        return {"size": size, "counts": [size[0] * size[1]]}
    packed: dict[str, Any] = rle.merge(rle.frPyObjects(whole, *size))
    return packed


def _unpack(packed: str | bytes) -> np.ndarray:
    """Run lengths from COCO's text: groups of 5 bits, low first, from the fourth on as difference to two before."""
    text = packed.encode("ascii") if isinstance(packed, str) else bytes(packed)
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
        raise ValueError("not packed run lengths")
    last = (codes & 32) == 0
    starts = np.flatnonzero(np.append(True, last[:-1]))
    places = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    if places.max() > 7:
        raise ValueError("a run length of more than 40 bits")
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    negative = (codes[last] & 16) > 0
    values -= np.where(negative, 1 << (5 * (places[last] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


class Layers:
    """A segment map that grows a layer where a segment would cover another."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.maps = [np.full(size, NONE, np.int32)]
        """int32 [H,W] each: index into segments, or NONE."""
        self.segments: list[RecordSegment] = []

    def add(self, segment: RecordSegment, window: Window, inside: np.ndarray) -> None:
        """Lay a segment, bool [h,w] in a box, on the lowest layer where its pixels are free."""
        free = (i for i, layer in enumerate(self.maps) if (layer[window][inside] == NONE).all())
        place = next(free, len(self.maps))
        if place == len(self.maps):
            self.maps.append(np.full(self.maps[0].shape, NONE, np.int32))
        self.maps[place][window][inside] = len(self.segments)
        self.segments.append(replace(segment, layer=place))

    def covered(self) -> np.ndarray:
        """Pixels that some layer has a segment at, bool [H,W]."""
        return np.logical_or.reduce([layer != NONE for layer in self.maps])


def layered(shapes: Iterable[tuple[RecordSegment, Runs]], size: tuple[int, int]) -> Layers:
    """Shapes by area: the smaller takes the lower layer, which is the one that the semantic map shows."""
    layers = Layers(size)
    for segment, runs in sorted(shapes, key=lambda pair: pair[1].area):
        window = runs.window()
        layers.add(segment, window, runs.inside(window))
    return layers


def compact_polygons(shape: Any) -> Any:
    """Polygons as arrays of doubles, a fourth of the memory of lists of floats; anything else as it is."""
    if not isinstance(shape, list):
        return shape
    try:
        return [array("d", polygon) for polygon in shape]
    except (TypeError, OverflowError):
        return shape  # refused when it is drawn
