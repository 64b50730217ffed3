"""What is read from a query: its class and its mask embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mf_scale.models.outputs import Classifier
from mf_scale.models.text_head import TextClassHead


class PredictionHeads(nn.Module):
    """Class embeddings [.,Q,W], mask embeddings [.,Q,C] and the classifier; one set for all decoder layers.

    Source: MaskFormer section 3.2, a linear classifier and a perceptron with two hidden layers.
    """

    def __init__(self, width: int, num_classes: int, mask_channels: int, class_rows: Tensor | None = None) -> None:
        """`class_rows` [K,D]: embeddings of the classes, for a head by text embeddings."""
        super().__init__()
        self.class_head: nn.Module
        if class_rows is None:
            self.class_head = ClassHead(width, num_classes + 1)
        else:
            self.class_head = TextClassHead(width, class_rows)
        self.mask_head = perceptron(width, mask_channels)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor, Classifier]:
        """Of queries [.,Q,width]."""
        embeddings, weight, bias = self.class_head(queries)
        return embeddings, self.mask_head(queries), Classifier(weight, bias)


class ClassHead(nn.Linear):
    """A linear classifier that does not multiply: class embeddings are the queries, the classifier is its parameters.

    The logits of all queries and layers are a large part of a step's memory where the vocabulary is large: the loss
    makes them a part at a time. Under autocast all of it is in autocast's type, as a product's factors would be.
    """

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # no product
        """Queries [.,Q,W] -> class embeddings [.,Q,W], weight [K+1,W], bias [K+1]; copies, whole under ZeRO-3 too."""
        # A tensor each, since what wraps modules looks for tensors in tuples, to gather parameters backward as well.
        dtype = _product_dtype(queries.device.type, self.weight.dtype)
        return queries.to(dtype), self.weight.to(dtype, copy=True), self.bias.to(dtype, copy=True)


def _product_dtype(kind: str, own: torch.dtype) -> torch.dtype:
    """The type a product on this kind of device has: autocast's, where it is on; the meta device knows none."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else own


def perceptron(width: int, mask_channels: int) -> nn.Sequential:
    """Queries [.,Q,width] -> embeddings [.,Q,C], with two hidden layers."""
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, mask_channels)
    )
