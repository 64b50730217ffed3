"""Masks of one image at the size they are wanted in, a band of rows at a time.

Shapes: N masks, H W result, h w prediction resolution. Nobody holds N x H x W floating-point values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

BUDGET_ELEMENTS = 16 * 2**20
"""fp32 values alive at once for one band of result rows (64 MiB)."""
COPIES = 4
"""Arrays of the size of a band's mask logits that interpolation keeps alive at once."""
Extent = tuple[float, float] | None
"""Part of the [h,w] grid that holds the image, in cells; None: all of it."""


@dataclass(frozen=True)
class Part:
    """The part of the result that a grid covers, where the grid holds a window of the image only."""

    rows: slice
    columns: slice
    offset: tuple[float, float]
    """Cells of the whole image's grid above, and left of, this grid."""


@dataclass(frozen=True)
class FactoredMasks:
    """The masks of one image, still a product, and the size they are wanted in."""

    embeddings: Tensor
    """[N,C]."""
    pixels: Tensor
    """[C,h,w]."""
    size: tuple[int, int]
    """H, W."""
    extent: Extent
    part: Part | None = None
    """None: all of the result. Else `extent` is that of the whole image all the same."""

    def strips(self, wide: int) -> Iterator[tuple[slice, FactoredMasks]]:
        """The masks of `wide` columns of the result at a time, with the cells that these need; of a whole grid only."""
        if wide >= self.size[1]:
            yield slice(0, self.size[1]), self
            return
        assert self.part is None, "parts of a part are not made"
        cells = self.pixels.shape[-1]
        extent = self.extent or (float(self.pixels.shape[-2]), float(cells))
        left, right, _ = _bilinear(self.size[1], cells, extent[1], 0.0, torch.device("cpu"))
        for columns in bands(self.size[1], wide):
            first, last = int(left[columns.start]), int(right[columns.stop - 1])
            part = Part(slice(0, self.size[0]), columns, (0.0, float(first)))
            yield columns, replace(self, pixels=self.pixels[..., first : last + 1], extent=extent, part=part)

    def bands(self, band: int) -> Iterator[tuple[slice, Tensor]]:
        """Mask logits at the wanted size, `band` rows at a time: (rows, fp32 [N,r,W])."""
        rows_at = self.resized()
        for rows in bands(self.size[0], band):
            yield rows, rows_at(rows)

    def resized(self) -> Callable[[slice], Tensor]:
        """A function that gives the mask logits of a range of result rows, fp32 [N,r,W] (W: the part's columns)."""
        embeddings, pixels = self.embeddings.float(), self.pixels.float()

        def product(first: int, last: int) -> Tensor:
            return torch.einsum("qc,chw->qhw", embeddings, pixels[:, first:last])

        return resized_rows(product, pixels, self.size, self.extent, self.part)


def bands(height: int, band: int) -> Iterator[slice]:
    """Rows 0..height, `band` at a time."""
    for start in range(0, height, band):
        yield slice(start, min(start + band, height))


def resized_rows(
    rows_of: Callable[[int, int], Tensor], grid: Tensor, size: tuple[int, int], extent: Extent, part: Part | None
) -> Callable[[slice], Tensor]:
    """A function from result rows to bilinearly resized maps of them, [N,r,W].

    `rows_of(first, last)` gives these rows of the maps, fp32 [N,last-first,w]; `grid` [...,h,w] says their size and
    device. Pixel centres lie at halves (align_corners=False).
    """
    cells = grid.shape[-2:]
    high, wide = extent or (float(cells[0]), float(cells[1]))
    above, before = part.offset if part else (0.0, 0.0)
    columns = part.columns if part else slice(0, size[1])
    top, bottom, down = _bilinear(size[0], cells[0], high, above, grid.device)
    left, right, across = (values[columns] for values in _bilinear(size[1], cells[1], wide, before, grid.device))
    first_cell, last_cell = top.tolist(), bottom.tolist()

    def rows_at(rows: slice) -> Tensor:
        first, last = first_cell[rows.start], last_cell[rows.stop - 1]
        coarse = rows_of(first, last + 1)
        coarse = torch.lerp(coarse[..., left], coarse[..., right], across)
        return torch.lerp(coarse[:, top[rows] - first], coarse[:, bottom[rows] - first], down[rows, None])

    return rows_at


def mask_logit(threshold: float) -> float:
    """The logit of a probability: masks are cut where their logits reach it. 0 and 1 give the infinities."""
    if not 0 < threshold < 1:
        return -math.inf if threshold <= 0 else math.inf
    return math.log(threshold / (1 - threshold))


def packed(masks: Tensor) -> Tensor:
    """bool [...,W] -> uint8 [...,ceil(W/8)], eight pixels a byte, the first in the highest bit (as numpy packs)."""
    bits = F.pad(masks.to(torch.uint8), (0, -masks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    place = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=masks.device)
    return (bits * place).sum(-1, dtype=torch.uint8)


def _bilinear(
    size: int, cells: int, extent: float, offset: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower cell, upper cell and weight of the upper one for each of `size` pixels spread over `extent` cells.

    The grid holds `cells` of them, from `offset` on. Pixel centres at halves (align_corners=False), clamped to the
    grid.
    """
    centre = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * (extent / size) - 0.5 - offset
    centre = centre.clamp(0, cells - 1)
    lower = centre.floor()
    weight = (centre - lower).float()
    lower_cell = lower.long()
    return lower_cell, (lower_cell + 1).clamp(max=cells - 1), weight
