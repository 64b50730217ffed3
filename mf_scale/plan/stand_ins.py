"""What a traced micro-batch needs beside the model: tensors without numbers, and what stands in for what reads numbers.

Fake tensors are on the "CPU" whatever device is planned for, since torch runs no backward pass of fake CUDA tensors
without a GPU. Two things differ on CUDA and are put in its place: attention, which fused kernels serve there, and the
workspaces of matching and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mf_scale.config.schema import Config
from mf_scale.data.batch import Batch
from mf_scale.matching.hungarian import Matching
from mf_scale.models.outputs import MaskPrediction, PixelPrediction
from mf_scale.plan.tracker import Workspace

_CPU_LOGITS, _THREADED, _CUDA_LOGITS = 2**18, 8, 2**26
"""Logits of an image that the matching works on at once: on a CPU so many times more with several threads."""
_CHANNELS = 16
"""Channels that oneDNN's blocks are rounded up to."""
_BAND = {"cpu": 2**20, "cuda": 2**25}
"""Per-pixel logits at the map's resolution that the baselines' loss works on at once."""
_POINT_TENSORS = 18
"""fp32 tensors of a pair's points that the point loss has at once, about: drawn, sampled, and what autograd keeps."""


def without_numbers(model: nn.Module) -> nn.Module:
    """Replace every tensor of a model on the meta device by a fake one on the CPU; to be called in a fake mode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_like(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _like(buffer)
    return model


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def empty_batch(images: int, crop: Iterable[int], segments: int) -> Batch:
    """A micro-batch of so many images with `segments` segments each, one layer; in a fake mode without numbers."""
    height, width = crop
    return Batch(
        images=torch.empty(images, 3, height, width, dtype=torch.uint8),
        segment_map=torch.empty(images, 1, height, width, dtype=torch.int16),
        labels=torch.empty(images, segments, dtype=torch.int64),
        segment_layer=torch.empty(images, segments, dtype=torch.int64),
        keys=[""] * images,
    )


def made_up_pairs(prediction: MaskPrediction, batch: Batch) -> Matching:
    """As many pairs as the matching finds, which reads numbers: every segment has a query in every layer."""
    layers, (images, queries) = len(prediction.layers()), prediction.mask_embeddings.shape[:2]
    matched = min(batch.labels.shape[1], queries)
    pairs = torch.empty(images, max(1, layers * matched), dtype=torch.int64)
    return Matching(
        slots=pairs,
        segments=torch.empty_like(pairs),
        layers=torch.empty_like(pairs),
        labels=torch.empty(images, layers * queries, dtype=torch.int64),
        counts=torch.empty(images, dtype=torch.int64),
        matched=matched * images,
        surplus=0,
        nonfinite=[],
    )


class FusedAttention(TorchFunctionMode):
    """torch's SDPA as CUDA's memory-efficient kernel: no scores are kept. xformers keeps the same tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        q, k, v = args
        bias = given.get("attn_mask")
        if bias is not None:
            bias = bias.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        run = torch.ops.aten._scaled_dot_product_efficient_attention
        return run(q, k, v, bias, True, given.get("dropout_p", 0.0), given.get("is_causal", False))[0]


def matching_workspace(prediction: MaskPrediction, batch: Batch, config: Config, device: str) -> int:
    """Bytes that the matching cost takes for a moment, at the end of the forward pass."""
    pixels, layers = prediction.pixel_embeddings, len(prediction.layers())
    images, channels, height, width = pixels.shape
    queries, segments, cells = prediction.mask_embeddings.shape[1], batch.labels.shape[1], height * width
    costs = 4 * 4 * images * layers * queries * segments
    if device == "cuda" and config.loss.kernels in ("auto", "triton"):
        # Costs, the splits' sums (about as much twice), and the embeddings, contiguous.
        return 3 * costs + pixels.numel() * pixels.element_size()
    at_once = min(layers * queries * cells, _logits_at_once(device))
    # One image's embeddings in fp32, in a copy of their own and, in half precision, in their dtype before.
    features = channels * cells * (4 + (pixels.element_size() if pixels.element_size() < 4 else 0))
    masks = segments * cells * 4 if config.loss.kernels == "eager" else 0
    return costs + features + masks + at_once * 4 * (6 if config.loss.kernels == "eager" else 2)


class HeldPixelLoss(torch.autograd.Function):
    """The baselines' loss as memory sees it: gradients of its three factors, made in the forward pass and kept."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, pixels: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(*(torch.empty(t.shape, dtype=t.dtype) for t in (embeddings, pixels, bias)))
        return pixels.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient * grads[0] for gradient in ctx.saved_tensors)


def pixel_loss(prediction: PixelPrediction) -> Tensor:
    """`HeldPixelLoss` of a prediction, in fp32."""
    with torch.autocast("cpu", enabled=False):
        embeddings, pixels = prediction.stacked().float(), prediction.pixel_embeddings.float()
        bias = embeddings.new_empty(embeddings.shape[2]) if prediction.bias is None else prediction.bias.float()
        total: Tensor = HeldPixelLoss.apply(embeddings, pixels, bias)
    return total


def pixel_workspace(prediction: PixelPrediction, batch: Batch, device: str) -> int:
    """Bytes that loss takes for a moment: an image's logits and their gradient, a band at full size, the classes."""
    classes, cells = prediction.class_embeddings.shape[1], prediction.pixel_embeddings[0, 0].numel()
    pixels = batch.segment_map.numel()
    return 3 * 4 * classes * cells + 3 * 4 * min(_BAND[device], classes * pixels) + 3 * 8 * pixels


def _logits_at_once(device: str) -> int:
    if device == "cuda":
        return _CUDA_LOGITS
    return _CPU_LOGITS * (_THREADED if torch.get_num_threads() > 1 else 1)


def workspaces(config: Config, device: str) -> dict[str, Workspace]:
    """What operators take inside themselves, by name."""
    found: dict[str, Workspace] = {"mf_scale::mask_loss": _of_mask_loss, "mf_scale::product": _of_product}
    if config.loss.points:
        points = config.loss.points

        def of_points(args: tuple[Any, ...], out: Any) -> int:
            return int(args[3].numel()) * points * 4 * _POINT_TENSORS

        found["mf_scale::mask_loss"] = of_points
    if device == "cpu":
        found |= {"aten::convolution": _of_convolution, "aten::convolution_backward": _of_convolution_backward}
    return found


def _of_mask_loss(args: tuple[Any, ...], out: Any) -> int:
    """The product's operands in fp32, and the logits [B,P,h,w]."""
    masks, pixels, segments = args[0], args[1], args[3]
    flat = pixels.numel() * pixels.element_size()  # channels last, so flattening copies
    return flat + _wide(pixels) + _wide(masks) + int(segments.numel()) * pixels.shape[2] * pixels.shape[3] * 4


def _of_product(args: tuple[Any, ...], out: Any) -> int:
    return _wide(args[0]) + _wide(args[1])


def _wide(tensor: Tensor) -> int:
    return tensor.numel() * 4 if tensor.element_size() < 4 else 0


def _of_convolution(args: tuple[Any, ...], out: Any) -> int:
    """oneDNN's copy of the weights in its own order."""
    return _blocked(args[1], int(args[8])) * args[1].element_size()


def _of_convolution_backward(args: tuple[Any, ...], out: Any) -> int:
    """The weights' gradient in fp32 and that order; copies of it on the way, but of 1 x 1 and depthwise ones."""
    weight, groups = args[2], int(args[9])
    half = weight.element_size() < 4
    copies = weight.element_size() if half else 8 * (groups == 1 and weight[0, 0].numel() > 1)
    return _blocked(weight, groups) * (4 + copies)


def _blocked(weight: Tensor, groups: int) -> int:
    """Elements of a weight [O,I/g,h,w] with each group's channels rounded up, which a depthwise one has one of."""
    outputs = -(-weight.shape[0] // groups)
    rounded = _up(outputs) * _up(weight.shape[1]) * groups
    return int(rounded * weight[0, 0].numel())


def _up(channels: int) -> int:
    return -(-channels // _CHANNELS) * _CHANNELS
