"""Masks as COCO writes them: compressed run lengths, column by column, as its own library encodes and reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_DIGITS = 13
"""Groups of five bits that the largest 64-bit difference needs."""


def coco_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask [H,W] as COCO's {"size": [H, W], "counts": text}; `pycocotools.mask.decode` gives it back.

    The counts are run lengths down the columns, the first one of zeros. From the fourth on a count is written as its
    difference from the one two before; each number in groups of five bits, lowest first, sign-extended, with bit 5
    set where more groups follow, as the character of 48 plus the group. Source: COCO API, maskApi.
    """
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate(([0], edges, [flat.size])).astype(np.int64)
    counts = np.diff(starts)
    if flat.size and flat[0]:
        counts = np.concatenate(([0], counts))
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]
    return {"size": [int(side) for side in mask.shape], "counts": _text(numbers)}


def bounding_box(mask: NDArray[np.bool_]) -> list[int]:
    """[x, y, width, height] in pixels, as COCO has it; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0, 0, 0, 0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _text(numbers: NDArray[np.int64]) -> str:
    """Numbers as groups of five bits, all numbers at once: a picture of noise has half a run a pixel."""
    groups = np.zeros((len(numbers), _DIGITS), dtype=np.uint8)
    written = np.zeros((len(numbers), _DIGITS), dtype=bool)
    rest, going = numbers.copy(), np.ones(len(numbers), dtype=bool)
    for place in range(_DIGITS):
        group = rest & 0x1F
        rest >>= 5  # arithmetic: a negative number ends at -1
        written[:, place] = going
        ended = np.where(group & 0x10, rest == -1, rest == 0)
        groups[:, place] = group | np.where(ended, 0, 0x20)
        going = going & ~ended
        if not going.any():
            break
    return (groups + 48)[written].tobytes().decode("ascii")
