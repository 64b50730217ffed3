"""transformers' MaskFormer with every tensor random: what the tests of the exchange compare with. No download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mf_scale.config.schema import BackboneConfig, DecoderConfig, LossConfig, ModelConfig
from mf_scale.models.exchange.families import FAMILIES
from mf_scale.models.exchange.transformers_config import model_json

CLASSES = 7
NAMES = [f"class {i}" for i in range(CLASSES)]
EVEN = (64, 96)


def model_config(name: str, *, layers: int = 6, **other: Any) -> ModelConfig:
    return ModelConfig(
        backbone=BackboneConfig(name=name, weights="none"), decoder=DecoderConfig(layers=layers), **other
    )


def random_maskformer(name: str, *, layers: int = 6) -> Any:
    """MaskFormerForInstanceSegmentation with a backbone of timm's `name` at its real depth, on the CPU, in eval mode.

    Norms and the statistics of batch norms are random too, so that no two of them can be exchanged unseen.
    """
    transformers = pytest.importorskip("transformers")
    described = model_json(model_config(name, layers=layers), LossConfig(), FAMILIES[name], NAMES)
    theirs = transformers.MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig(**described)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in theirs.modules():
            _randomise(module, generator)
        _settle(theirs, generator)
    return theirs


def saved(theirs: Any, folder: Path, **options: Any) -> Path:
    """A folder as transformers writes it, with what an image processor of it would hold."""
    theirs.save_pretrained(folder, **options)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 96, "longest_edge": 128}, "size_divisor": 32})
    )
    return folder


def mask_logits(prediction: Any) -> Tensor:
    """[B,Q,h,w] of our prediction."""
    return torch.einsum("bqc,bchw->bqhw", prediction.mask_embeddings, prediction.pixel_embeddings)


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    def uniform(tensor: Any, low: float, high: float) -> None:
        tensor.uniform_(low, high, generator=generator)

    if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
        uniform(module.weight, 0.5, 1.0)
        uniform(module.bias, -0.5, 0.5)
    if isinstance(module, nn.BatchNorm2d):
        uniform(module.running_mean, -0.3, 0.3)
        uniform(module.running_var, 0.5, 1.5)
    elif isinstance(module, nn.Linear | nn.Conv2d):
        module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
        if module.bias is not None:
            uniform(module.bias, -0.3, 0.3)
    elif isinstance(table := getattr(module, "relative_position_bias_table", None), Tensor):
        table.normal_(generator=generator)


def _settle(theirs: Any, generator: torch.Generator) -> None:
    """Scale what the random features feed, so that logits are between 1 and 10 and a tolerance means something."""
    image = torch.randn(1, 3, *EVEN, generator=generator)
    features = theirs.model.pixel_level_module(image).encoder_last_hidden_state
    projection = theirs.model.transformer_module.input_projection
    projection.weight /= features.std()
    out = theirs(image)
    theirs.class_predictor.weight *= 3 / out.class_queries_logits.std()
    last = theirs.mask_embedder.get_submodule("2.0")
    last.weight *= 2 / out.masks_queries_logits.std()
    last.bias *= 2 / out.masks_queries_logits.std()
