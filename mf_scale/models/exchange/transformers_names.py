"""Names of weights in transformers' MaskFormerForInstanceSegmentation, as its folders hold them on disk.

Source: transformers, models/maskformer, models/resnet and conversion_mapping (its classes call some of them otherwise,
and map them when they load and save).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mf_scale.config.schema import ModelConfig
from mf_scale.errors import UserError
from mf_scale.models.exchange.families import ResNet, Swin
from mf_scale.models.exchange.links import NORM, Link, same, same_batch_norm, to_theirs

_ENCODER = "model.pixel_level_module.encoder"
_FPN = "model.pixel_level_module.decoder.fpn"
_MODULE = "model.transformer_module"
_UNUSED = {
    "criterion.empty_weight": "the loss's class weights, which are configuration here",
    f"{_ENCODER}.model.layernorm.weight": "a norm behind Swin's last stage whose output MaskFormer does not use",
    f"{_ENCODER}.model.layernorm.bias": "a norm behind Swin's last stage whose output MaskFormer does not use",
}
_NEWER = [
    (r"^(model\.transformer_module\.decoder\.layers\.\d+)\.mlp\.(fc[12]\.)", r"\1.\2"),
    (r"\.o_proj\.", ".out_proj."),
]
"""Names inside the classes of transformers 5, for files that were saved without its mapping: pattern, name on disk."""


def transformers_links(config: ModelConfig, backbone: ResNet | Swin) -> list[Link]:
    """How the weights of `config`'s model, with this backbone, are called there."""
    links = _resnet(backbone) if isinstance(backbone, ResNet) else _swin(backbone)
    return [*links, *_pixel_decoder(), *_transformer(config, backbone.channels), *_heads()]


def on_disk(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of a folder, whichever names the program that saved them used."""
    return {_older(name): tensor for name, tensor in given.items()}


def without_use(name: str) -> str | None:
    """Why a tensor of theirs has no counterpart here, in a few words, or None for one that should have."""
    if name.endswith(".relative_position_index"):
        return "the index of relative positions, which follows from the window"
    return _UNUSED.get(name)


def export_tensors(
    config: ModelConfig, backbone: ResNet | Swin, state: Mapping[str, Tensor], no_object_weight: float
) -> dict[str, Tensor]:
    """Our state_dict under their names, with everything their class expects; UserError for what has no place there."""
    links = transformers_links(config, backbone)
    translation = to_theirs(links, state)
    nameless = (*translation.missing, *translation.unexpected)
    if nameless:
        raise UserError(f"tensors of this model have no place in transformers' MaskFormer: {', '.join(nameless[:12])}")
    tensors = translation.tensors
    for link in links:
        if link.optional:
            tensors.setdefault(link.theirs[0], torch.zeros((), dtype=torch.int64))
    class_weights = torch.ones(len(state["heads.class_head.bias"]))
    class_weights[-1] = no_object_weight
    tensors["criterion.empty_weight"] = class_weights
    if isinstance(backbone, Swin):
        tensors[f"{_ENCODER}.model.layernorm.weight"] = torch.ones(backbone.channels)
        tensors[f"{_ENCODER}.model.layernorm.bias"] = torch.zeros(backbone.channels)
        index = relative_position_index(backbone.window)
        for name in list(tensors):
            if name.endswith(".relative_position_bias_table"):
                tensors[name.replace("_bias_table", "_index")] = index.clone()
    return tensors


def relative_position_index(window: int) -> Tensor:
    """[N,N] for the N = window^2 tokens of a window: the bias table's row of each pair. Source: Swin, section 3.2."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    below = rows.flatten()[:, None] - rows.flatten()[None] + window - 1
    beside = columns.flatten()[:, None] - columns.flatten()[None] + window - 1
    return below * (2 * window - 1) + beside


def _older(name: str) -> str:
    for pattern, older in _NEWER:
        name = re.sub(pattern, older, name)
    return name


def _resnet(backbone: ResNet) -> list[Link]:
    stem = f"{_ENCODER}.embedder.embedder"
    links = same("backbone.net.conv1", f"{stem}.convolution", ["weight"])
    links += same_batch_norm("backbone.net.bn1", f"{stem}.normalization")
    for ours, theirs, stage, block in _blocks(backbone):
        for i in range(3 if backbone.bottleneck else 2):
            links += same(f"{ours}.conv{i + 1}", f"{theirs}.layer.{i}.convolution", ["weight"])
            links += same_batch_norm(f"{ours}.bn{i + 1}", f"{theirs}.layer.{i}.normalization")
        if block == 0 and backbone.has_shortcut(stage):
            links += same(f"{ours}.downsample.0", f"{theirs}.shortcut.convolution", ["weight"])
            links += same_batch_norm(f"{ours}.downsample.1", f"{theirs}.shortcut.normalization")
    return links


def _blocks(backbone: ResNet) -> Iterator[tuple[str, str, int, int]]:
    for stage, depth in enumerate(backbone.depths):
        for block in range(depth):
            theirs = f"{_ENCODER}.encoder.stages.{stage}.layers.{block}"
            yield f"backbone.net.layer{stage + 1}.{block}", theirs, stage, block


def _swin(backbone: Swin) -> list[Link]:
    net, embeddings, stages = "backbone.net", f"{_ENCODER}.model.embeddings", f"{_ENCODER}.model.encoder.layers"
    links = same(f"{net}.patch_embed.proj", f"{embeddings}.patch_embeddings.projection")
    links += same(f"{net}.patch_embed.norm", f"{embeddings}.norm")
    for stage, depth in enumerate(backbone.depths):
        if stage:  # here a stage starts with the merging of patches, there the stage before ends with it
            links += same(f"{net}.layers_{stage}.downsample.norm", f"{stages}.{stage - 1}.downsample.norm")
            links += same(
                f"{net}.layers_{stage}.downsample.reduction", f"{stages}.{stage - 1}.downsample.reduction", ["weight"]
            )
        for block in range(depth):
            links += _swin_block(f"{net}.layers_{stage}.blocks.{block}", f"{stages}.{stage}.blocks.{block}")
        links += same(f"backbone.norms.{stage}", f"{_ENCODER}.hidden_states_norms.{stage}")
    return links


def _swin_block(ours: str, theirs: str) -> list[Link]:
    table = "relative_position_bias_table"
    joined = [
        Link((f"{ours}.attn.qkv.{e}",), tuple(f"{theirs}.attention.self.{p}.{e}" for p in ("query", "key", "value")))
        for e in NORM
    ]
    return [
        *joined,
        Link((f"{ours}.attn.{table}",), (f"{theirs}.attention.self.{table}",)),
        *same(f"{ours}.attn.proj", f"{theirs}.attention.output.dense"),
        *same(f"{ours}.norm1", f"{theirs}.layernorm_before"),
        *same(f"{ours}.norm2", f"{theirs}.layernorm_after"),
        *same(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense"),
        *same(f"{ours}.mlp.fc2", f"{theirs}.output.dense"),
    ]


def _pixel_decoder() -> list[Link]:
    links = _convolution("pixel_decoder.coarsest", f"{_FPN}.stem")
    for i in range(3):
        links += _convolution(f"pixel_decoder.laterals.{i}", f"{_FPN}.layers.{i}.proj")
        links += _convolution(f"pixel_decoder.smooths.{i}", f"{_FPN}.layers.{i}.block")
    return links + same("pixel_decoder.mask_features", "model.pixel_level_module.decoder.mask_projection")


def _convolution(ours: str, theirs: str) -> list[Link]:
    return same(f"{ours}.0", f"{theirs}.0", ["weight"]) + same(f"{ours}.1", f"{theirs}.1")


def _transformer(config: ModelConfig, channels: int) -> list[Link]:
    links = same("transformer_decoder.queries", f"{_MODULE}.queries_embedder", ["weight"])
    links += same("transformer_decoder.norm", f"{_MODULE}.decoder.layernorm")
    if channels != config.decoder.width:
        links += same("transformer_decoder.project", f"{_MODULE}.input_projection")
    for i in range(config.decoder.layers):
        ours, theirs = f"transformer_decoder.layers.{i}", f"{_MODULE}.decoder.layers.{i}"
        for our_part, their_part in (("self_attention", "self_attn"), ("cross_attention", "encoder_attn")):
            for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out")):
                links += same(f"{ours}.{our_part}.{name}", f"{theirs}.{their_part}.{letter}_proj")
        norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
        for number, norm in enumerate(norms):
            links += same(f"{ours}.norms.{number}", f"{theirs}.{norm}")
        links += same(f"{ours}.widen", f"{theirs}.fc1") + same(f"{ours}.narrow", f"{theirs}.fc2")
    return links


def _heads() -> list[Link]:
    links = same("heads.class_head", "class_predictor")
    for i in range(3):
        links += same(f"heads.mask_head.{2 * i}", f"mask_embedder.{i}.0")
    return links
