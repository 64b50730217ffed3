"""Names of weights in checkpoints of the original MaskFormer, which is built on detectron2.

Source: facebookresearch/MaskFormer (modeling/heads, modeling/transformer, modeling/backbone/swin), detectron2's ResNet
and the stem of its DeepLab project.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mf_scale.config.schema import ModelConfig
from mf_scale.models.exchange.families import ResNet, Swin
from mf_scale.models.exchange.links import NORM, Link, same, same_batch_norm

_HEAD = "sem_seg_head"
_PIXELS = f"{_HEAD}.pixel_decoder"
_PREDICTOR = f"{_HEAD}.predictor"
_DEEP_STEM = (("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1"))
"""timm's convolution and norm of DeepLab's conv1, conv2 and conv3."""
_UNUSED = {
    "criterion.empty_weight": "the loss's class weights, which are configuration here",
    "pixel_mean": "the mean of the images, which follows from the backbone here",
    "pixel_std": "the standard deviation of the images, which follows from the backbone here",
}


def detectron2_links(config: ModelConfig, backbone: ResNet | Swin) -> list[Link]:
    """How the weights of `config`'s model, with this backbone, are called there."""
    links = _resnet(backbone) if isinstance(backbone, ResNet) else _swin(backbone)
    encoded = config.pixel_decoder.encoder_layers > 0
    memory_channels = config.pixel_decoder.width if encoded else backbone.channels
    links += _pixel_decoder() + (_encoder(config) if encoded else [])
    return [*links, *_predictor(config, projected=memory_channels != config.decoder.width)]


def as_saved_today(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names the code has today.

    The published files are older: there the pixel decoder's parts lie directly in the head.
    """
    known = (f"{_PIXELS}.", f"{_PREDICTOR}.")

    def today(name: str) -> str:
        older = name.startswith(f"{_HEAD}.") and not name.startswith(known)
        return f"{_PIXELS}.{name.removeprefix(f'{_HEAD}.')}" if older else name

    return {today(name): tensor for name, tensor in given.items()}


def without_use(name: str) -> str | None:
    """Why a tensor of theirs has no counterpart here, in a few words, or None for one that should have."""
    if name.endswith(".relative_position_index"):
        return "the index of relative positions, which follows from the window"
    return _UNUSED.get(name)


def caveat(config: ModelConfig, backbone: ResNet | Swin) -> str | None:
    """What the names of the original cannot say, but a person has to know."""
    if isinstance(backbone, ResNet) and backbone.deep_stem and not config.backbone.multi_grid:
        return (
            "the original's R101c dilates the 3x3 convolutions of its last stage (RES5_MULTI_GRID 1, 2, 4), this "
            "configuration does not: set model.backbone.multi_grid=[1,2,4], else the predictions are not the original's"
        )
    return None


def _convolution_norm(ours: tuple[str, str], theirs: str) -> list[Link]:
    return same(ours[0], theirs, ["weight"]) + same_batch_norm(ours[1], f"{theirs}.norm")


def _resnet(backbone: ResNet) -> list[Link]:
    net, links = "backbone.net", []
    stem = _DEEP_STEM if backbone.deep_stem else (("conv1", "bn1"),)
    for number, (convolution, norm) in enumerate(stem, start=1):
        links += _convolution_norm((f"{net}.{convolution}", f"{net}.{norm}"), f"backbone.stem.conv{number}")
    for stage, depth in enumerate(backbone.depths):
        for block in range(depth):
            ours, theirs = f"{net}.layer{stage + 1}.{block}", f"backbone.res{stage + 2}.{block}"
            for i in range(1, 4 if backbone.bottleneck else 3):
                links += _convolution_norm((f"{ours}.conv{i}", f"{ours}.bn{i}"), f"{theirs}.conv{i}")
            if block == 0 and backbone.has_shortcut(stage):
                links += _convolution_norm((f"{ours}.downsample.0", f"{ours}.downsample.1"), f"{theirs}.shortcut")
    return links


def _swin(backbone: Swin) -> list[Link]:
    net = "backbone.net"
    links = same(f"{net}.patch_embed.proj", "backbone.patch_embed.proj")
    links += same(f"{net}.patch_embed.norm", "backbone.patch_embed.norm")
    for stage, depth in enumerate(backbone.depths):
        if stage:  # here a stage starts with the merging of patches, there the stage before ends with it
            ours, theirs = f"{net}.layers_{stage}.downsample", f"backbone.layers.{stage - 1}.downsample"
            links += same(f"{ours}.norm", f"{theirs}.norm") + same(
                f"{ours}.reduction", f"{theirs}.reduction", ["weight"]
            )
        for block in range(depth):
            ours, theirs = f"{net}.layers_{stage}.blocks.{block}", f"backbone.layers.{stage}.blocks.{block}"
            for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                links += same(f"{ours}.{part}", f"{theirs}.{part}")
            links += same(f"{ours}.attn", f"{theirs}.attn", ["relative_position_bias_table"])
        links += same(f"backbone.norms.{stage}", f"backbone.norm{stage}")
    return links


def _pixel_decoder() -> list[Link]:
    links = _group_normed("pixel_decoder.coarsest", f"{_PIXELS}.layer_4")
    for i in range(3):  # counted from the coarse end here, from the fine one there
        links += _group_normed(f"pixel_decoder.laterals.{i}", f"{_PIXELS}.adapter_{3 - i}")
        links += _group_normed(f"pixel_decoder.smooths.{i}", f"{_PIXELS}.layer_{3 - i}")
    return links + same("pixel_decoder.mask_features", f"{_PIXELS}.mask_features")


def _group_normed(ours: str, theirs: str) -> list[Link]:
    return same(f"{ours}.0", theirs, ["weight"]) + same(f"{ours}.1", f"{theirs}.norm")


def _encoder(config: ModelConfig) -> list[Link]:
    encoder = f"{_PIXELS}.transformer.encoder"
    links = same("pixel_decoder.encoder.project", f"{_PIXELS}.input_proj")
    for i in range(config.pixel_decoder.encoder_layers):
        ours, theirs = f"pixel_decoder.encoder.layers.{i}", f"{encoder}.layers.{i}"
        links += _attention(f"{ours}.self_attention", f"{theirs}.self_attn") + _layer(ours, theirs, norms=2)
    return links + (same("pixel_decoder.encoder.norm", f"{encoder}.norm") if config.decoder.pre_norm else [])


def _predictor(config: ModelConfig, *, projected: bool) -> list[Link]:
    decoder = f"{_PREDICTOR}.transformer.decoder"
    links = same("transformer_decoder.project", f"{_PREDICTOR}.input_proj") if projected else []
    links += same("transformer_decoder.queries", f"{_PREDICTOR}.query_embed", ["weight"])
    links += same("transformer_decoder.norm", f"{decoder}.norm")
    for i in range(config.decoder.layers):
        ours, theirs = f"transformer_decoder.layers.{i}", f"{decoder}.layers.{i}"
        links += _attention(f"{ours}.self_attention", f"{theirs}.self_attn")
        links += _attention(f"{ours}.cross_attention", f"{theirs}.multihead_attn")
        links += _layer(ours, theirs, norms=3)
    links += same("heads.class_head", f"{_PREDICTOR}.class_embed")
    for i in range(3):
        links += same(f"heads.mask_head.{2 * i}", f"{_PREDICTOR}.mask_embed.layers.{i}")
    return links


def _attention(ours: str, theirs: str) -> list[Link]:
    joined = [
        Link(tuple(f"{ours}.{part}.{ending}" for part in ("query", "key", "value")), (f"{theirs}.in_proj_{ending}",))
        for ending in NORM
    ]
    return joined + same(f"{ours}.output", f"{theirs}.out_proj")


def _layer(ours: str, theirs: str, *, norms: int) -> list[Link]:
    links = same(f"{ours}.widen", f"{theirs}.linear1") + same(f"{ours}.narrow", f"{theirs}.linear2")
    for number in range(norms):
        links += same(f"{ours}.norms.{number}", f"{theirs}.norm{number + 1}")
    return links
