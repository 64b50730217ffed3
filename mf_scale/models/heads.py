"""What is read from a query: its class and its mask embedding."""

from __future__ import annotations

from torch import Tensor, nn


class PredictionHeads(nn.Module):
    """Class logits [.,Q,K+1] and mask embeddings [.,Q,C] of queries [.,Q,width]; one set for all decoder layers.

    Source: MaskFormer section 3.2, a linear classifier and a perceptron with two hidden layers.
    """

    def __init__(self, width: int, num_classes: int, mask_channels: int) -> None:
        super().__init__()
        self.class_head = nn.Linear(width, num_classes + 1)
        self.mask_head = perceptron(width, mask_channels)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_head(queries), self.mask_head(queries)


def perceptron(width: int, mask_channels: int) -> nn.Sequential:
    """Queries [.,Q,width] -> embeddings [.,Q,C], with two hidden layers."""
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, mask_channels)
    )
