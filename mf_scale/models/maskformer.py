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
    """Images -> class, mask and pixel embeddings and a classifier; masks and class logits stay factored.

    Source: Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation", section 3.2.
    The same operations run whatever the batch holds, so all ranks build the same graph.
    """

    def __init__(
        self,
        backbone: PixelBackbone,
        pixel_decoder: PixelEmbedder,
        config: ModelConfig,
        num_classes: int,
        class_rows: Tensor | None = None,
    ) -> None:
        """`class_rows` [K,D]: embeddings of the classes, for a class head by text embeddings."""
        super().__init__()
        self.num_classes, self.queries, self.stride = num_classes, config.decoder.queries, backbone.stride
        self.prepare = PrepareImages(backbone.mean, backbone.std, config.size_divisor)
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.transformer_decoder = TransformerDecoder(pixel_decoder.memory_channels, config.decoder, config.attention)
        self.heads = PredictionHeads(config.decoder.width, num_classes, config.pixel_decoder.mask_channels, class_rows)

    def forward(self, images: Tensor) -> MaskPrediction:
        """images [B,3,H,W], uint8 or float in 0..255, sides of 32 or more; h, w = ceil(H/stride), ceil(W/stride)."""
        height, width = images.shape[-2:]
        pixel_embeddings, memory = self.pixel_decoder(self.backbone(self.prepare(images)))
        pixel_embeddings = pixel_embeddings[..., : -(-height // self.stride), : -(-width // self.stride)]
        class_embeddings, mask_embeddings, classifier = self.heads(self.transformer_decoder(memory))
        by_layer = zip(class_embeddings.unbind(), mask_embeddings.unbind(), strict=True)
        *aux, last = (LayerPrediction(*layer) for layer in by_layer)
        return MaskPrediction(last.class_embeddings, last.mask_embeddings, pixel_embeddings, classifier, tuple(aux))
