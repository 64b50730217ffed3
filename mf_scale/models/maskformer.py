"""MaskFormer: backbone, pixel decoder, Transformer decoder and heads put together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.config.schema import ModelConfig
from mf_scale.errors import UserError
from mf_scale.models.attention import resolve_kernel
from mf_scale.models.backbones import STRIDES, Backbone, build_backbone
from mf_scale.models.heads import PredictionHeads
from mf_scale.models.outputs import LayerPrediction, MaskPrediction
from mf_scale.models.pixel_decoder import PixelDecoder
from mf_scale.models.transformer_decoder import TransformerDecoder


class MaskFormer(nn.Module):
    """Images -> class logits, mask embeddings and pixel embeddings; the masks stay factored.

    Source: Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation", section 3.2.
    The same operations run whatever the batch holds, so all ranks build the same graph.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        decoder, masks = config.decoder, config.pixel_decoder
        self.num_classes, self.queries, self.attention = num_classes, decoder.queries, config.attention
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(backbone.channels, masks.width, masks.mask_channels)
        self.transformer_decoder = TransformerDecoder(backbone.channels[-1], decoder, config.attention)
        self.heads = PredictionHeads(decoder.width, num_classes, masks.mask_channels)
        scale = 255.0  # images hold 0..255, timm's statistics are for 0..1
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1) * scale, persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1) * scale, persistent=False)

    @property
    def attention_kernel(self) -> str:
        """The attention kernel that serves on the model's device, in the dtype of the autocast in force."""
        weight = self.transformer_decoder.queries.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return resolve_kernel(self.attention, kind, dtype)

    def forward(self, images: Tensor) -> MaskPrediction:
        """images [B,3,H,W], uint8 or float in 0..255, any size; h, w = ceil(H/4), ceil(W/4)."""
        height, width = images.shape[-2:]
        features = self.backbone(self._prepare(images))
        pixel_embeddings = self.pixel_decoder(features)[..., : -(-height // STRIDES[0]), : -(-width // STRIDES[0])]
        class_logits, mask_embeddings = self.heads(self.transformer_decoder(features[-1]))
        layers = [
            LayerPrediction(*layer) for layer in zip(class_logits.unbind(), mask_embeddings.unbind(), strict=True)
        ]
        return MaskPrediction(layers[-1].class_logits, layers[-1].mask_embeddings, pixel_embeddings, tuple(layers[:-1]))

    def _prepare(self, images: Tensor) -> Tensor:
        """Normalised with the backbone's statistics, then padded with zeros below and right to a multiple of 32.

        (The paper's code pads so.) Channels last: on a CPU the demo's backbone is 7% faster, its FPN 25%.
        """
        height, width = images.shape[-2:]
        normalised = (images.to(self.mean.dtype) - self.mean) / self.std
        padded = F.pad(normalised, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        return padded.contiguous(memory_format=torch.channels_last)


def build_model(config: ModelConfig, num_classes: int, *, seed: int) -> MaskFormer:
    """Build on the CPU in fp32; equal seeds give equal weights and the caller's random state is left alone.

    Raises UserError for sizes that cannot be, and what `build_backbone` raises.
    """
    _check(config, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskFormer(build_backbone(config.backbone), config, num_classes)


def _check(config: ModelConfig, num_classes: int) -> None:
    decoder, masks = config.decoder, config.pixel_decoder
    counts = {
        "num_classes": num_classes,
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
    if decoder.width % decoder.heads or decoder.width % 4:
        raise UserError(
            f"decoder width {decoder.width} must divide by its {decoder.heads} heads and by 4",
            where="model.decoder",
            remedy="The heads share the width; the sine position takes quarters of it.",
        )
