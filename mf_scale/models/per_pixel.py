"""The per-pixel baselines of the paper: a class for every pixel, without masks and matching."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from mf_scale.config.schema import ModelConfig
from mf_scale.models.heads import perceptron
from mf_scale.models.outputs import PixelPrediction
from mf_scale.models.pixel_level import PixelBackbone, PixelEmbedder
from mf_scale.models.prepare import PrepareImages
from mf_scale.models.transformer_decoder import TransformerDecoder


class PerPixelModel(nn.Module):
    """What the baselines share with MaskFormer: images -> pixel embeddings and memory."""

    def __init__(
        self, backbone: PixelBackbone, pixel_decoder: PixelEmbedder, config: ModelConfig, num_classes: int
    ) -> None:
        super().__init__()
        self.num_classes, self.stride = num_classes, backbone.stride
        self.prepare = PrepareImages(backbone.mean, backbone.std, config.size_divisor)
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,H,W], uint8 or float in 0..255 -> pixel embeddings [B,C,h,w] without padding, memory."""
        height, width = images.shape[-2:]
        pixel_embeddings, memory = self.pixel_decoder(self.backbone(self.prepare(images)))
        return pixel_embeddings[..., : -(-height // self.stride), : -(-width // self.stride)], memory


class PerPixelBaseline(PerPixelModel):
    """A 1x1 classifier on the pixel embeddings: logits [B,K,h,w]. Source: MaskFormer section 4.1 and its code."""

    def __init__(
        self, backbone: PixelBackbone, pixel_decoder: PixelEmbedder, config: ModelConfig, num_classes: int
    ) -> None:
        super().__init__(backbone, pixel_decoder, config, num_classes)
        self.classifier = nn.Linear(pixel_decoder.channels, num_classes)
        nn.init.kaiming_normal_(self.classifier.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> PixelPrediction:
        """The classifier's rows are the class embeddings of every image; h, w = ceil(H/stride), ceil(W/stride)."""
        pixel_embeddings, _ = self.embed(images)
        rows = self.classifier.weight.expand(images.shape[0], -1, -1)
        return PixelPrediction(rows, pixel_embeddings, self.classifier.bias)


class PerPixelBaselinePlus(PerPixelModel):
    """MaskFormer's decoder with one query a class: mask embeddings x pixel embeddings are the class logits [B,K,h,w].

    No class head, no matching: query k is class k. Source: MaskFormer section 4.1 and its code.
    """

    def __init__(
        self, backbone: PixelBackbone, pixel_decoder: PixelEmbedder, config: ModelConfig, num_classes: int
    ) -> None:
        super().__init__(backbone, pixel_decoder, config, num_classes)
        decoder = replace(config.decoder, queries=num_classes)
        self.transformer_decoder = TransformerDecoder(pixel_decoder.memory_channels, decoder, config.attention)
        self.mask_head = perceptron(decoder.width, pixel_decoder.channels)

    def forward(self, images: Tensor) -> PixelPrediction:
        """One prediction a decoder layer (deep supervision); h, w = ceil(H/stride), ceil(W/stride)."""
        pixel_embeddings, memory = self.embed(images)
        *aux, last = self.mask_head(self.transformer_decoder(memory)).unbind()
        return PixelPrediction(last, pixel_embeddings, aux=tuple(aux))


def build(
    backbone: PixelBackbone, pixel_decoder: PixelEmbedder, config: ModelConfig, num_classes: int
) -> PerPixelModel:
    """The baseline that `config.kind` names, from the parts of a MaskFormer."""
    kinds = {"per_pixel": PerPixelBaseline, "per_pixel_plus": PerPixelBaselinePlus}
    return kinds[config.kind](backbone, pixel_decoder, config, num_classes)
