"""Random batches and predictions for tests of matching and losses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mf_scale.data.batch import IGNORE, NO_LABEL, NONE, Batch
from mf_scale.kernels.choose import why_not
from mf_scale.models.outputs import Classifier, LayerPrediction, MaskPrediction, PixelPrediction

CLASSES = 7
WIDTH = 3
"""Of class embeddings."""


def random_batch(
    segments: Sequence[int],
    size: tuple[int, int] = (24, 32),
    *,
    map_layers: int = 1,
    ignored: bool = True,
    seed: int = 0,
) -> Batch:
    """A batch with `segments[b]` segments in image b; coarse cells of segments, NONE, and IGNORE in layer 0."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(segments), max(segments, default=0)
    labels = torch.full((B, T), NO_LABEL)
    layer = torch.zeros(B, T, dtype=torch.int64)
    segment_map = torch.full((B, map_layers, *size), NONE, dtype=torch.int16)
    for b, count in enumerate(segments):
        labels[b, :count] = torch.randint(0, CLASSES, (count,), generator=generator)
        layer[b, :count] = torch.randint(0, map_layers, (count,), generator=generator)
        for index in range(map_layers):
            own = torch.nonzero(layer[b, :count] == index).flatten().tolist()
            choices = torch.tensor([*own, NONE, *([IGNORE] if ignored and index == 0 else [])], dtype=torch.int16)
            cells = choices[torch.randint(0, len(choices), (4, 4), generator=generator)]
            segment_map[b, index] = _enlarge(cells, size)
    images = torch.randint(0, 256, (B, 3, *size), dtype=torch.uint8, generator=generator)
    return Batch(images, segment_map, labels, layer, [f"image-{b}" for b in range(B)])


def _enlarge(cells: Tensor, size: tuple[int, int]) -> Tensor:
    rows = torch.arange(size[0]) * cells.shape[0] // size[0]
    columns = torch.arange(size[1]) * cells.shape[1] // size[1]
    return cells[rows[:, None], columns]


def random_prediction(
    images: int,
    *,
    layers: int = 2,
    queries: int = 5,
    size: tuple[int, int] = (6, 8),
    channels: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> MaskPrediction:
    """A prediction of leaf tensors that take gradients."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    parts = [LayerPrediction(leaf(images, queries, WIDTH), leaf(images, queries, channels)) for _ in range(layers)]
    pixels, classifier = leaf(images, channels, *size), Classifier(leaf(CLASSES + 1, WIDTH), leaf(CLASSES + 1))
    return MaskPrediction(parts[-1].class_embeddings, parts[-1].mask_embeddings, pixels, classifier, tuple(parts[:-1]))


def said_outright(class_logits: Tensor, mask_embeddings: Tensor, pixel_embeddings: Tensor) -> MaskPrediction:
    """A prediction with these class logits [B,Q,K+1]: they are its class embeddings, the classifier the identity."""
    classifier = Classifier(torch.eye(class_logits.shape[-1], dtype=class_logits.dtype, device=class_logits.device))
    return MaskPrediction(class_logits, mask_embeddings, pixel_embeddings, classifier)


def leaves(prediction: MaskPrediction) -> list[Tensor]:
    """All tensors of a prediction that take gradients."""
    by_layer = [t for layer in prediction.layers() for t in (layer.class_embeddings, layer.mask_embeddings)]
    classifier = [t for t in (prediction.classifier.weight, prediction.classifier.bias) if t is not None]
    return [*by_layer, *classifier, prediction.pixel_embeddings]


def part(prediction: MaskPrediction, start: int, stop: int) -> MaskPrediction:
    """Images start..stop of a prediction; gradients flow to the whole one."""
    cut = [LayerPrediction(x.class_embeddings[start:stop], x.mask_embeddings[start:stop]) for x in prediction.layers()]
    last, pixels = cut[-1], prediction.pixel_embeddings[start:stop]
    return MaskPrediction(last.class_embeddings, last.mask_embeddings, pixels, prediction.classifier, tuple(cut[:-1]))


def random_pixel_prediction(
    images: int,
    *,
    layers: int = 2,
    classes: int = CLASSES,
    size: tuple[int, int] = (6, 8),
    channels: int = 4,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> PixelPrediction:
    """Per-pixel prediction of leaf tensors that take gradients; pixel embeddings channels last, as models have them."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    *aux, last = (leaf(images, classes, channels) for _ in range(layers))
    pixels = leaf(images, channels, *size).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    return PixelPrediction(last, pixels, leaf(classes) if bias else None, tuple(aux))


def pixel_leaves(prediction: PixelPrediction) -> list[Tensor]:
    """All tensors of a per-pixel prediction that take gradients."""
    bias = [] if prediction.bias is None else [prediction.bias]
    return [*prediction.aux, prediction.class_embeddings, prediction.pixel_embeddings, *bias]


def pixel_part(prediction: PixelPrediction, start: int, stop: int) -> PixelPrediction:
    """Images start..stop of a per-pixel prediction; gradients flow to the whole one."""
    aux = tuple(embeddings[start:stop] for embeddings in prediction.aux)
    last, pixels = prediction.class_embeddings[start:stop], prediction.pixel_embeddings[start:stop]
    return PixelPrediction(last, pixels, prediction.bias, aux)


def skip_without(kernels: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip the test where these kernels cannot run on the CPU."""
    reason = why_not(kernels, "cpu", dtype)
    if reason is not None:
        pytest.skip(f"no {kernels} kernels here: {reason}")


def as_embeddings(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and pixel embeddings whose product is `logits` [B,P,h,w]: the identity, without gradient, and they."""
    return torch.eye(logits.shape[1], dtype=logits.dtype).expand(len(logits), -1, -1), logits
