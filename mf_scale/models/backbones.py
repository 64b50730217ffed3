"""timm models as backbones: features at strides 4, 8, 16 and 32 behind one small interface."""

from __future__ import annotations

import difflib
import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.config.schema import BackboneConfig
from mf_scale.errors import UserError
from mf_scale.models.any_size import image_multiple, pad_to, rounded_up
from mf_scale.models.backbone_weights import Convert, fit_backbone, weights_file
from mf_scale.models.norms import narrow_frozen_norms
from mf_scale.models.pixel_level import PixelBackbone
from mf_scale.models.recompute import quarters, recompute, stage_units
from mf_scale.models.resizing import repeating_resizes
from mf_scale.models.swin import restore_original
from mf_scale.models.vit import PATCH, SimplePyramid, serve_attention

STRIDES = (4, 8, 16, 32)
PYRAMID_WIDTH = 256
"""Channels of the pyramid on a plain ViT (ViTDet: 256)."""
logger = logging.getLogger(__name__)


class Backbone(PixelBackbone):
    """Features at strides 4, 8, 16, 32: a list of [B,c,h,w] for an image [B,3,H,W] normalised with `mean` and `std`.

    h and w are H and W over the stride, rounded up, for any image: zeros below and right make it a multiple of
    `multiple`. `net` is timm's feature extractor, under timm's names. `norms` are the layer norms that MaskFormer's
    Swin has on each of its outputs; `pyramid` stands on a network with one map only.
    """

    stride = STRIDES[0]

    def __init__(self, net: nn.Module, multiple: int = 1, *, normed: bool = False) -> None:
        super().__init__()
        facts: Any = net
        info, pretrained = facts.feature_info, facts.pretrained_cfg
        self.net, self.multiple = net, multiple
        self.mean, self.std = tuple(pretrained["mean"]), tuple(pretrained["std"])
        reductions, channels = info.reduction(), info.channels()
        self.rows_first = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
        plain = is_plain(reductions)
        # several stages may share a stride: the deepest one has seen most
        self.picks = [
            max(i for i, r in enumerate(reductions) if r == s) for s in (reductions[:1] if plain else STRIDES)
        ]
        self.channels = [PYRAMID_WIDTH] * len(STRIDES) if plain else [channels[i] for i in self.picks]
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels) if normed else None
        self.pyramid = SimplePyramid(channels[-1], PYRAMID_WIDTH) if plain else None

    def forward(self, images: Tensor) -> list[Tensor]:
        with repeating_resizes(images.device):
            features = self.net(pad_to(images, self.multiple))
        picked = [features[i] for i in self.picks]
        if self.norms is not None:
            picked = [norm(feature) for norm, feature in zip(self.norms, picked, strict=True)]
        if self.rows_first:
            picked = [feature.permute(0, 3, 1, 2) for feature in picked]
        if self.pyramid is not None:
            picked = self.pyramid(picked[0])
        if self.multiple == 1:
            return picked
        sizes = [rounded_up(images.shape[-2:], stride) for stride in STRIDES]
        return [feature[..., :h, :w] for feature, (h, w) in zip(picked, sizes, strict=True)]


def build_backbone(config: BackboneConfig, attention: str = "auto") -> Backbone:
    """Build the timm model `config.name` with its weights; the RNG in force initialises what has none.

    `attention` is the kernel its attention asks `models.attention` for. Swin computes what the original does; a plain
    ViT gets patches of 16 pixels and a simple feature pyramid. SwinV2 and other window models stay as timm has them,
    freed from their image size where timm can do that.
    UserError for an unknown name (nearest names shown), a model without the strides or bound to one image size, rates
    and stages that it does not have, and weights that cannot be had.
    """
    from timm.layers import Attention, AttentionRope
    from timm.models.eva import EvaAttention
    from timm.models.swin_transformer import SwinTransformer

    classifier = _classifier(config.name)
    swin = isinstance(classifier, SwinTransformer)
    options = {**_rates(config, type(classifier)), **_sizes(config.name, classifier, swin)}
    multiple = _multiple(config, options)
    net = _create(config, options, pretrained=config.weights == "timm")
    _pad_patches(net)
    if config.multi_grid:
        _dilate_last_stage(config, net)
    notes = []
    if config.weights not in ("timm", "none"):
        notes.append(_load(config, net, _classifier(config.name, **_without_output(options))))
    if config.freeze_norm:
        net = freeze_norms(net)
    blocks = sum(1 for module in net.modules() if _attends(module))
    served = restore_original(net, attention) if swin else 0
    served += serve_attention(net, (Attention, AttentionRope, EvaAttention), attention)
    if blocks:
        notes.append(f"attention in the backbone: {served} of {blocks} blocks through models.attention")
    if config.recompute_stages:
        notes.append(_recompute(config, net))
    if swin and config.weights != "none":
        notes.append("the layer norms on Swin's outputs start at identity: pretrained weights have none")
    backbone = Backbone(net, multiple, normed=swin)
    backbone.notes = notes
    for note in notes:
        logger.info(note)
    return backbone


def freeze_norms(model: nn.Module) -> nn.Module:
    """Every batch norm keeps its statistics and affine, untrained, as in FrozenBN; modules are replaced in place."""
    from timm.layers import freeze_batch_norm_2d

    return narrow_frozen_norms(freeze_batch_norm_2d(model))


def _classifier(name: str, **options: Any) -> nn.Module:
    """The network with its classification head and without memory: its constructor, names and shapes are wanted."""
    import timm

    if ":" in name or not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise UserError(
            f"timm has no model {name!r}",
            where="model.backbone.name",
            remedy=f"Nearest names: {', '.join(nearest) or 'none'}.",
        )
    with torch.device("meta"):
        return timm.create_model(name, **options)


def _rates(config: BackboneConfig, kind: type) -> dict[str, float]:
    """The three rates as timm calls them; 0 is said too, since some models have other defaults.

    (timm's `drop_rate` is none of them: it acts before the classifier, and there is none here.)
    """
    wanted = {
        "proj_drop_rate": ("dropout", config.dropout),
        "attn_drop_rate": ("attention_dropout", config.attention_dropout),
        "drop_path_rate": ("drop_path", config.drop_path),
    }
    for option, (field, value) in wanted.items():
        if value and not _takes(kind, option):
            raise UserError(
                f"model.backbone.{field} = {value}, but {config.name!r} has nothing that it could act on",
                where=f"model.backbone.{field}",
                remedy="Set it to 0 for this backbone.",
            )
    return {option: value for option, (_, value) in wanted.items() if _takes(kind, option)}


def _sizes(name: str, classifier: Any, swin: bool) -> dict[str, Any]:
    """What frees the model from one image size."""
    kind = type(classifier)
    if is_plain([info["reduction"] for info in getattr(classifier, "feature_info", None) or []]):
        options: dict[str, Any] = {"dynamic_img_size": True} if _takes(kind, "dynamic_img_size") else {}
        if classifier.feature_info[-1]["reduction"] != PATCH:
            # the image grows with the patch, so that the position embeddings keep their grid
            grid = classifier.patch_embed.grid_size
            options |= {"patch_size": PATCH, "img_size": tuple(PATCH * cells for cells in grid)}
        return {**options, "out_indices": 1}
    free = {"strict_img_size": False} if _takes(kind, "strict_img_size") else {}
    return free | ({"always_partition": True} if swin else {})


def _multiple(config: BackboneConfig, options: Mapping[str, Any]) -> int:
    """What image sides are padded to a multiple of; refuses what can be without memory for the network."""
    with torch.device("meta"):
        # In eval mode: a batch norm behind global pooling refuses a single image in training mode.
        outline = _create(config, options, pretrained=False).eval()
        reductions = outline.feature_info.reduction()
        _refuse_other_strides(config.name, reductions)
        _pad_patches(outline)
        coarsest = PATCH if is_plain(reductions) else STRIDES[-1]
        own_size = int(outline.pretrained_cfg["input_size"][-1])
        return image_multiple(Backbone(outline).eval(), STRIDES, coarsest, own_size, config.name)


def _pad_patches(net: Any) -> None:
    """Let the patch embedding of a window model pad below and right to whole patches, as the original Swin does."""
    patches: Any = getattr(net, "patch_embed", None)
    if hasattr(patches, "dynamic_img_pad"):
        patches.dynamic_img_pad = True


def _without_output(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "out_indices"}


def _takes(kind: type, option: str) -> bool:
    """Whether the constructor knows the option, itself or through what it hands on to its base."""
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            if option in parameters:
                return True
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
                return False
    return False


def _attends(module: nn.Module) -> bool:
    """timm marks most softmax attention by `fused_attn`; what it computes otherwise, as in SwinV2, is named so."""
    return hasattr(module, "fused_attn") or type(module).__name__.endswith("Attention")


def is_plain(reductions: Sequence[int]) -> bool:
    """One stride only, of at least 8: a plain ViT."""
    return len(set(reductions)) == 1 and reductions[0] >= STRIDES[1]


def _create(config: BackboneConfig, options: Mapping[str, Any], *, pretrained: bool) -> Any:
    import timm

    try:
        return timm.create_model(config.name, features_only=True, pretrained=pretrained, **options)
    except Exception as error:  # timm refuses in many ways; a network or a cache may fail; the reason is passed on
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if pretrained:
            raise UserError(
                f"timm's pretrained weights of {config.name!r} cannot be had: {first}",
                where="model.backbone.weights",
                remedy="Without a network give a file or package:NAME; `none` starts from random weights.",
            ) from error
        raise UserError(
            f"timm cannot build {config.name!r} as a feature extractor: {first}",
            where="model.backbone",
            remedy="Take a model with a feature pyramid, or a plain ViT.",
        ) from error


def _load(config: BackboneConfig, net: nn.Module, classifier: nn.Module) -> str:
    file = weights_file(config.weights)
    own = getattr(sys.modules[type(classifier).__module__], "checkpoint_filter_fn", None)
    convert: Convert | None = None if own is None else lambda tensors: own(tensors, classifier)
    fitted, how = fit_backbone(file, net.state_dict(), classifier.state_dict(), convert)
    net.load_state_dict(fitted, strict=False)  # completeness was checked; only batch norm's counters are missing
    return f"backbone weights from {file.name} matched {how}"


def _refuse_other_strides(name: str, reductions: Sequence[int]) -> None:
    lacking = [stride for stride in STRIDES if stride not in reductions]
    if lacking and not is_plain(reductions):
        raise UserError(
            f"backbone {name!r} has no features at stride {', '.join(map(str, lacking))}, only at {list(reductions)}",
            where="model.backbone.name",
            remedy="MaskFormer needs a feature pyramid at strides 4, 8, 16 and 32, or a plain ViT.",
        )


def _dilate_last_stage(config: BackboneConfig, net: Any) -> None:
    """Dilate the 3x3 convolutions of a ResNet's last stage, in place; strides and parameters stay.

    Source: DeepLab's multi-grid, as detectron2 has it at stride 32 (RES5_MULTI_GRID).
    """
    blocks = list(getattr(net, "layer4", []))
    bottlenecks = [b for b in blocks if hasattr(b, "conv3") and type(b.conv2) is nn.Conv2d]
    if len(blocks) != len(config.multi_grid) or len(bottlenecks) != len(blocks):
        raise UserError(
            f"multi_grid = {config.multi_grid}, but the last stage of {config.name!r} has "
            + (f"{len(blocks)} blocks" if bottlenecks else "no bottlenecks of a ResNet"),
            where="model.backbone.multi_grid",
            remedy="Give one dilation for each bottleneck of a ResNet's last stage, or leave it empty.",
        )
    for block, dilation in zip(blocks, config.multi_grid, strict=True):
        # The first block's convolution also strides; detectron2 dilates it like the others.
        block.conv2.dilation = block.conv2.padding = (dilation, dilation)


def _recompute(config: BackboneConfig, net: Any) -> str:
    """Recompute the wanted stages: those that end in the four features, or quarters of a plain ViT's blocks."""
    info = net.feature_info
    reductions, modules = info.reduction(), info.module_name()
    try:
        if is_plain(reductions):
            stages = quarters(list(net.model.blocks))
        else:
            stages = stage_units(net, [modules[max(i for i, r in enumerate(reductions) if r == s)] for s in STRIDES])
    except (KeyError, AttributeError):  # a network whose features do not come from its modules
        stages = [[]] * len(STRIDES)
    units = [stages[n - 1] if 1 <= n <= len(stages) else [] for n in sorted(set(config.recompute_stages))]
    if not all(units):
        raise UserError(
            f"backbone {config.name!r} has no blocks that could be recomputed in stages {config.recompute_stages}",
            where="model.backbone.recompute_stages",
            remedy="Leave it empty for this backbone, or take other stages.",
        )
    for blocks in units:
        recompute(blocks)
    return f"recomputed in the backward pass: {sum(map(len, units))} blocks of the backbone"
