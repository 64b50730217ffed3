"""MaskFormer: pixel level, Transformer decoder and heads put together."""

from __future__ import annotations

from torch import Tensor, nn

from mf_scale.config.schema import ModelConfig
from mf_scale.models.heads import PredictionHeads
from mf_scale.models.outputs import LayerPrediction, MaskPrediction
from mf_scale.models.pixel_level import PixelBackbone, PixelEmbedder
from mf_scale.models.prepare import PrepareImages
from mf_scale.models.transformer_decoder import TransformerDecoder


class MaskFormer(nn.Module):
    """Images -> class logits, mask embeddings and pixel embeddings; the masks stay factored.

    Source: Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation", section 3.2.
    The same operations run whatever the batch holds, so all ranks build the same graph.
    """

    def __init__(
        self, backbone: PixelBackbone, pixel_decoder: PixelEmbedder, config: ModelConfig, num_classes: int
    ) -> None:
        super().__init__()
        self.num_classes, self.queries, self.stride = num_classes, config.decoder.queries, backbone.stride
        self.prepare = PrepareImages(backbone.mean, backbone.std, config.size_divisor)
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.transformer_decoder = TransformerDecoder(pixel_decoder.memory_channels, config.decoder, config.attention)
        self.heads = PredictionHeads(config.decoder.width, num_classes, config.pixel_decoder.mask_channels)

    def forward(self, images: Tensor) -> MaskPrediction:
        """images [B,3,H,W], uint8 or float in 0..255, sides of 32 or more; h, w = ceil(H/stride), ceil(W/stride)."""
        height, width = images.shape[-2:]
        pixel_embeddings, memory = self.pixel_decoder(self.backbone(self.prepare(images)))
        pixel_embeddings = pixel_embeddings[..., : -(-height // self.stride), : -(-width // self.stride)]
        class_logits, mask_embeddings = self.heads(self.transformer_decoder(memory))
        layers = [
            LayerPrediction(*layer) for layer in zip(class_logits.unbind(), mask_embeddings.unbind(), strict=True)
        ]
        return MaskPrediction(layers[-1].class_logits, layers[-1].mask_embeddings, pixel_embeddings, tuple(layers[:-1]))
