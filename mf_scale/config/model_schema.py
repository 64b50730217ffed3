"""The configuration of the model; see `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional


def choice(default: str, *options: str) -> Any:
    """A string field that takes one of `options`; `load.py` refuses anything else."""
    return field(default=default, metadata={"choices": (default, *options)})


@dataclass
class BackboneConfig:
    """The pixel-level module's encoder: a timm model with a feature pyramid."""

    name: str = "resnet50"
    """timm model name: one with features at strides 4, 8, 16 and 32, or a plain ViT, which gets a simple pyramid."""
    weights: str = "timm"
    """timm (its default download), none (random), a file (.safetensors, .pth), or package:NAME (installed weights)."""
    freeze_norm: bool = True
    """Batch norm keeps its pretrained statistics and affine (paper: FrozenBN)."""
    drop_path: float = 0.0
    """Stochastic depth rate, where the backbone has it (paper: 0.3 for Swin)."""
    multi_grid: list[int] = field(default_factory=list)
    """Dilations of the 3x3 convolutions in the bottlenecks of a ResNet's last stage; empty: none (R101c: 1, 2, 4)."""
    dropout: float = 0.0
    """Dropout rate of projections and feed-forward parts, where the backbone has them (paper: 0)."""
    attention_dropout: float = 0.0
    """Dropout rate on the attention weights, where the backbone has attention (paper: 0)."""
    recompute_stages: list[int] = field(default_factory=list)
    """Stages, 1 to 4, whose activations are not kept but made again in the backward pass (less memory, more time). Of a
    plain ViT: quarters of its blocks."""


@dataclass
class PixelDecoderConfig:
    """The FPN that makes pixel embeddings at stride 4, if wanted with a Transformer encoder on the stride-32 map."""

    width: int = 256
    """Channels of the FPN (paper: 256)."""
    mask_channels: int = 256
    """C: channels of pixel and mask embeddings (paper: 256)."""
    encoder_layers: int = 0
    """Transformer encoder layers on the stride-32 map, as wide as the FPN (paper: 6 for panoptic with ResNets, else 0).
    Heads, feedforward, dropout and pre_norm are the decoder's."""


@dataclass
class DecoderConfig:
    """The Transformer decoder: learned queries attend to the stride-32 map."""

    layers: int = 6
    """Decoder layers (paper: 6)."""
    queries: int = 100
    """Q: queries, an upper bound of segments found in an image (paper: 100)."""
    width: int = 256
    """Channels (paper: 256)."""
    heads: int = 8
    """Attention heads (paper: 8)."""
    feedforward: int = 2048
    """Hidden channels of the feed-forward part (paper: 2048)."""
    dropout: float = 0.1
    """Dropout rate (paper: 0.1)."""
    pre_norm: bool = False
    """Normalise before attention and feed-forward instead of after the sum (paper: after)."""
    deep_supervision: bool = True
    """Predictions of every layer enter the loss (paper: yes)."""


@dataclass
class PixelLevelConfig:
    """Any per-pixel segmentation model in the place of backbone and pixel decoder."""

    builder: Optional[str] = None
    """package.module:function that returns the torch model; none: backbone and FPN. Its code is run."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the builder."""
    features: Optional[str] = None
    """Path of the classifier, whose input becomes the features, for example classifier.4; none: found in a trial."""
    memory: Optional[str] = None
    """Path of the layer whose output the queries attend to; none: the features, averaged down to stride 32."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of the images the model expects, RGB in 0..1 (ImageNet's)."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of the images the model expects, RGB in 0..1 (ImageNet's)."""


@dataclass
class ModelConfig:
    """MaskFormer: backbone, pixel decoder, Transformer decoder, heads; or one of the paper's per-pixel baselines."""

    kind: str = choice("mask_classification", "per_pixel", "per_pixel_plus")
    """mask_classification: MaskFormer; per_pixel: PerPixelBaseline, a classifier on the pixel embeddings;
    per_pixel_plus: PerPixelBaseline+, one query a class. The baselines do data.task=semantic only."""
    num_classes: Optional[int] = None
    """K. None takes the vocabulary's; a number must equal it."""
    class_embeddings: Optional[str] = None
    """File of a matrix [K,D] (.safetensors or .npy), one row a class, made by any encoder of text: class logits are
    then the cosines of queries and rows, times a learned scale. Another file at inference is another vocabulary. None:
    a linear classifier (paper)."""
    size_divisor: int = 32
    """Images are padded with zeros, below and right, to a multiple of it; 1: not at all (paper: 32)."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Encoder."""
    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    """Pixel embeddings."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Queries."""
    pixel_level: PixelLevelConfig = field(default_factory=PixelLevelConfig)
    """A model of your own as the pixel-level module."""
    attention: str = choice("auto", "xformers", "sdpa", "reference")
    """Attention kernel; auto takes the first that runs here: xformers, then torch SDPA."""
    compile: bool = False
    """torch.compile in training, for the one shape that data.crop gives (the first steps take minutes)."""
