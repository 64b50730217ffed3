"""Segmentation models as users bring them: builders for the tests of conversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5


class Own(nn.Module):
    """A model of one's own: stride 8, a classifier with an upsampling behind it, an auxiliary head, a spare table."""

    def __init__(self, classes: int = CLASSES, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.neck = nn.Conv2d(width, classes, 1)
        """As many channels as classes, but not the last layer."""
        self.widen = nn.Conv2d(classes, width, 1)
        self.head = nn.Conv2d(width, classes, 1)
        self.auxiliary = nn.Conv2d(width, classes, 1)
        self.spare = nn.Parameter(torch.zeros(3))

    def features(self, images: Tensor) -> Tensor:
        return self.widen(self.neck(self.body(self.stem(images))))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        stem = self.stem(images)
        features = self.widen(self.neck(self.body(stem)))
        out = F.interpolate(self.head(features), size=images.shape[-2:], mode="bilinear")
        return {"out": out, "aux": self.auxiliary(stem)}


class Tokens(nn.Module):
    """Features channels last, classified by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 14, 14)
        self.classify = nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.patches(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TwoHeads(nn.Module):
    """Two layers share the classification."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, 4, 1)
        self.left, self.right = nn.Conv2d(8, CLASSES, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return self.left(features) + self.right(features)


class Labels(nn.Module):
    """Returns classes, not logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, CLASSES, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images).argmax(1)


class Padded(nn.Module):
    """Its padding gives the features no whole stride."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, 4, 11), nn.Conv2d(8, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def own(**arguments: Any) -> Own:
    return Own(**arguments)


def two_heads() -> TwoHeads:
    return TwoHeads()


def padded() -> Padded:
    return Padded()


def labels() -> Labels:
    return Labels()


def number() -> int:
    return 3


def failing(reason: str = "no luck") -> nn.Module:
    raise ValueError(reason)


not_a_function = 7
