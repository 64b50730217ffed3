"""timm models as backbones: features at strides 4, 8, 16 and 32 behind one small interface."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.config.schema import BackboneConfig
from mf_scale.errors import UserError
from mf_scale.models.backbone_weights import fit_backbone, weights_file
from mf_scale.models.pixel_level import PixelBackbone

STRIDES = (4, 8, 16, 32)
logger = logging.getLogger(__name__)


class Backbone(PixelBackbone):
    """Features at strides 4, 8, 16, 32: a list of [B,c,h,w] for an image [B,3,H,W] normalised with `mean` and `std`."""

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.mean, self.std = tuple(mean), tuple(std)
        self.stride = STRIDES[0]
        info: Any = net.feature_info
        reductions, channels = info.reduction(), info.channels()
        # several stages may share a stride: the deepest one has seen most
        self.picks = [max(i for i, r in enumerate(reductions) if r == stride) for stride in STRIDES]
        self.channels = [channels[i] for i in self.picks]
        self.rows_first = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.net(images)
        picked = [features[i] for i in self.picks]
        return [f.permute(0, 3, 1, 2).contiguous() for f in picked] if self.rows_first else picked


def build_backbone(config: BackboneConfig, attention: str = "auto") -> Backbone:
    """Build the timm model `config.name` with its weights; the RNG in force initialises what has none.

    UserError for an unknown name (nearest names shown), a model without the strides, and weights that cannot be had.
    """
    import timm
    from timm.layers import freeze_batch_norm_2d

    if ":" in config.name or not timm.is_model(config.name):
        nearest = difflib.get_close_matches(config.name, timm.list_models(), n=5, cutoff=0.5)
        raise UserError(
            f"timm has no model {config.name!r}",
            where="model.backbone.name",
            remedy=f"Nearest names: {', '.join(nearest) or 'none'}.",
        )
    classifier = _on_meta(config)
    options: dict[str, Any] = {}
    if "strict_img_size" in inspect.signature(type(classifier).__init__).parameters:
        options["strict_img_size"] = False  # window attention at any image size
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    net = _create(config, pretrained=config.weights == "timm", **options)
    _refuse_other_strides(config.name, net.feature_info.reduction())
    if config.weights not in ("timm", "none"):
        file = weights_file(config.weights)
        fitted, how = fit_backbone(file, net.state_dict(), classifier.state_dict())
        net.load_state_dict(fitted, strict=False)  # completeness was checked; only batch norm's counters are missing
        logger.info("backbone weights from %s matched %s", file.name, how)
    if config.freeze_norm:
        net = freeze_batch_norm_2d(net)
    return Backbone(net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"])


def _on_meta(config: BackboneConfig) -> nn.Module:
    """The network with its classification head and without memory: its constructor, names and shapes are wanted."""
    import timm

    with torch.device("meta"):
        return timm.create_model(config.name)


def _create(config: BackboneConfig, *, pretrained: bool, **options: Any) -> Any:
    import timm

    try:
        net = timm.create_model(config.name, features_only=True, **options)
    except Exception as error:  # timm's many models refuse in many ways; the reason is passed on
        raise UserError(
            f"timm cannot build {config.name!r} as a feature extractor: {error}",
            where="model.backbone",
            remedy="Take a model with a feature pyramid; drop_path must be 0 where the model has none.",
        ) from error
    if not pretrained:
        return net
    try:
        return timm.create_model(config.name, features_only=True, pretrained=True, **options)
    except Exception as error:  # no network, no such weights, a damaged cache: the reason is passed on
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"timm's pretrained weights of {config.name!r} cannot be had: {first}",
            where="model.backbone.weights",
            remedy="Without a network give a file or package:NAME; `none` starts from random weights.",
        ) from error


def _refuse_other_strides(name: str, reductions: Sequence[int]) -> None:
    lacking = [stride for stride in STRIDES if stride not in reductions]
    if lacking:
        raise UserError(
            f"backbone {name!r} has no features at stride {', '.join(map(str, lacking))}, only at {list(reductions)}",
            where="model.backbone.name",
            remedy="MaskFormer needs a feature pyramid at strides 4, 8, 16 and 32.",
        )
