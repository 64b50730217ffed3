"""The class head by text embeddings: class logits are the cosines of a query and the classes' rows, times a scale.

Source: Radford et al. 2021 (CLIP) for cosines with a learned, bounded scale of initially 1 / 0.07; Zareian et al. 2021
for classes as rows that an encoder of text makes, and a learned vector for what is none of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_SCALE, LARGEST_SCALE, FIRST_SCALE = 1.0, 100.0, 1 / 0.07
"""Of the cosines, that is 1 / temperature: CLIP's first value and bound."""
CLASS_ROWS = "heads.class_head.rows"
"""Name of the rows [K,D] in a model's state: the only tensor of this head that belongs to the classes."""


class TextClassHead(nn.Module):
    """Queries [.,Q,width] -> embeddings [.,Q,D] of length 1, and what they are multiplied with: see `ClassHead`.

    The rows are not trained; what is: the projection, the scale and the vector of no-object. So a head takes any rows
    of the same encoder, in any number.
    """

    def __init__(self, width: int, rows: Tensor) -> None:
        """`rows` [K,D] of length 1."""
        super().__init__()
        size = rows.shape[1]
        self.register_buffer("rows", rows.clone())
        self.project = nn.Linear(width, size)
        self.no_object = nn.Parameter(F.normalize(torch.randn(size), dim=0))
        self.scale = nn.Parameter(torch.tensor([_parameter_of(FIRST_SCALE)]))

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor, None]:
        """Embeddings, and rows and no-object times the scale [K+1,D], both in fp32; there is no bias."""
        projected = self.project(queries)
        rows: Tensor = self.rows  # type: ignore[assignment]  # a buffer
        # Autocast lowers products, and here is none: all of this stays fp32 on every device, the meta device too.
        scale = SMALLEST_SCALE * torch.exp(self.scale.sigmoid() * math.log(LARGEST_SCALE / SMALLEST_SCALE))
        weight = scale * torch.cat((rows, F.normalize(self.no_object, dim=0)[None]))
        return F.normalize(projected.float(), dim=-1), weight, None


def _parameter_of(scale: float) -> float:
    """What the sigmoid makes this scale of: bounded smoothly, so that no gradient is cut off at a bound."""
    share = math.log(scale / SMALLEST_SCALE) / math.log(LARGEST_SCALE / SMALLEST_SCALE)
    return math.log(share / (1 - share))


def rows_without_meaning(classes: int, size: int) -> Tensor:
    """Rows [K,D] of length 1 for a head whose own are loaded later, or whose numbers do not matter."""
    return F.normalize(torch.randn(classes, size), dim=1)
