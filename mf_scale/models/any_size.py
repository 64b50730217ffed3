"""Which image sizes a backbone takes: found by running it without memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.errors import UserError


def image_multiple(backbone: nn.Module, strides: Sequence[int], multiple: int, own_size: int, name: str) -> int:
    """1 if `backbone`, on the meta device, takes any image and rounds sizes up at each stride; else `multiple`, else
    `own_size`, the image it was made for, where it takes multiples of that only (MaxViT, whose grid is of windows).

    UserError where it does not take those either: it is bound to one image size.
    """
    reasons = {side: _refusal(backbone, strides, (5 * side, 3 * side)) for side in (multiple, own_size)}
    fitting = [side for side, reason in reasons.items() if reason is None]
    if not fitting:
        reason = reasons[multiple]
        raise UserError(
            f"backbone {name!r} does not take images of any size: {reason}",
            where="model.backbone.name",
            remedy="Take a model that does, such as a ResNet, ConvNeXt, Swin, EfficientNet or ViT.",
        )
    multiple = fitting[0]
    return 1 if _refusal(backbone, strides, (2 * multiple + 6, multiple + 18)) is None else multiple


def _refusal(backbone: nn.Module, strides: Sequence[int], size: tuple[int, int]) -> str | None:
    wanted = [rounded_up(size, stride) for stride in strides]
    try:
        with torch.no_grad():
            found = [tuple(f.shape[-2:]) for f in backbone(torch.empty(1, 3, *size, device="meta"))]
    except Exception as error:  # networks refuse a size in many ways; the reason is passed on
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None if found == wanted else f"features of {found} pixels for an image of {size}"


def rounded_up(size: Sequence[int], stride: int) -> tuple[int, int]:
    """Height and width over the stride, rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)


def pad_to(images: Tensor, multiple: int) -> Tensor:
    """Images [..,H,W] with zeros below and right, so that both sides are multiples."""
    bottom, right = -images.shape[-2] % multiple, -images.shape[-1] % multiple
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images
