"""From the configuration to the model it means."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mf_scale.config.schema import ModelConfig
from mf_scale.errors import UserError
from mf_scale.models import convert, per_pixel
from mf_scale.models.attention import resolve_kernel
from mf_scale.models.backbones import build_backbone
from mf_scale.models.class_embeddings import embedding_width
from mf_scale.models.maskformer import MaskFormer
from mf_scale.models.norms import widen_norms
from mf_scale.models.pixel_decoder import PixelDecoder
from mf_scale.models.pixel_level import PixelBackbone, PixelEmbedder
from mf_scale.models.text_head import rows_without_meaning


def build_model(config: ModelConfig, num_classes: int, *, seed: int, class_rows: Tensor | None = None) -> nn.Module:
    """Build on the CPU in fp32; equal seeds give equal weights and the caller's random state is left alone.

    `class_rows` [K,D] are the vocabulary's rows of config.class_embeddings. None: rows of that file's width without
    meaning, for a model whose weights are loaded later or do not matter. Raises UserError for sizes that cannot be, and
    what the builders of the parts raise.
    """
    _check(config, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, pixel_decoder = _pixel_level(config)
        if config.kind == "mask_classification":
            if class_rows is None and config.class_embeddings is not None:
                class_rows = rows_without_meaning(num_classes, embedding_width(config.class_embeddings))
            model: nn.Module = MaskFormer(backbone, pixel_decoder, config, num_classes, class_rows)
        else:
            model = per_pixel.build(backbone, pixel_decoder, config, num_classes)
    widen_norms(model)
    return model


def serving_kernel(requested: str, device: torch.device) -> str:
    """The attention kernel that serves on `device` in the dtype of the autocast in force; raises UserError."""
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return resolve_kernel(requested, kind, dtype)


def _pixel_level(config: ModelConfig) -> tuple[PixelBackbone, PixelEmbedder]:
    """What makes pixel embeddings, in two parts: backbone and FPN, or a model of the user's own."""
    if config.pixel_level.builder is not None:
        return convert.pixel_level(config)
    backbone = build_backbone(config.backbone, config.attention)
    return backbone, PixelDecoder(backbone.channels, config)


def _check(config: ModelConfig, num_classes: int) -> None:
    decoder, masks = config.decoder, config.pixel_decoder
    counts = {
        "num_classes": num_classes,
        "size_divisor": config.size_divisor,
        "decoder.layers": decoder.layers,
        "decoder.queries": decoder.queries,
        "decoder.width": decoder.width,
        "decoder.heads": decoder.heads,
        "decoder.feedforward": decoder.feedforward,
        "pixel_decoder.width": masks.width,
        "pixel_decoder.mask_channels": masks.mask_channels,
    }
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"model.{name} must be at least 1, not {value}")
    widths = {"model.decoder": decoder.width}
    if masks.encoder_layers:
        widths["model.pixel_decoder"] = masks.width
    for where, width in widths.items():
        if width % decoder.heads or width % 4:
            raise UserError(
                f"width {width} must divide by the {decoder.heads} attention heads and by 4",
                where=where,
                remedy="The heads share the width; the sine position takes quarters of it.",
            )
