"""Inputs of the benchmark: their shape, and random ones of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mf_scale.data.batch import Batch
from mf_scale.models.outputs import Classifier, LayerPrediction, MaskPrediction


@dataclass(frozen=True)
class Shape:
    """What is measured; the defaults are those of the published comparison on a CPU."""

    images: int = 2
    queries: int = 100
    segments: int = 15
    """Of each image."""
    cells: int = 128
    """h and w, of the mask logits."""
    size: int = 512
    """H and W, of the segment map."""
    layers: int = 6
    """Supervised decoder layers."""
    channels: int = 256
    classes: int = 150


def make_inputs(shape: Shape, device: torch.device, seed: int = 0) -> tuple[MaskPrediction, Batch]:
    """A random prediction whose mask logits have a spread of about 3, and maps of patches, one segment each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(device)

    B, Q, C, T = shape.images, shape.queries, shape.channels, shape.segments
    layers = [LayerPrediction(normal(B, Q, C), normal(B, Q, C, scale=3 / C**0.5)) for _ in range(shape.layers)]
    classifier = Classifier(normal(shape.classes + 1, C, scale=1 / C**0.5), normal(shape.classes + 1, scale=0.1))
    pixels = normal(B, C, shape.cells, shape.cells)
    grid = max(2, round((2 * T) ** 0.5))
    patches = torch.randint(0, max(T, 1), (B, 1, grid, grid), generator=generator)
    patches.view(B, -1)[:, :T] = torch.arange(T)[: grid * grid]
    places = torch.arange(shape.size) * grid // shape.size
    segment_map = (patches if T else patches - 1)[..., places[:, None], places].to(torch.int16).to(device)
    labels = torch.randint(0, shape.classes, (B, T), generator=generator).to(device)
    images = torch.zeros(B, 3, 1, 1, dtype=torch.uint8, device=device)
    batch = Batch(images, segment_map, labels, torch.zeros_like(labels), [f"image-{b}" for b in range(B)])
    last = layers[-1]
    return MaskPrediction(last.class_embeddings, last.mask_embeddings, pixels, classifier, tuple(layers[:-1])), batch
