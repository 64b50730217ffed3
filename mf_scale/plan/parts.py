"""The model of a configuration without its numbers: parameters and FLOPs by part, and what there is to partition.

The model is built on torch's meta device: no weights are loaded or allocated. FLOPs are 2 x multiply-accumulate of the
forward pass of one image of data.crop, counted by torch.utils.flop_counter (convolutions and matrix products).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mf_scale.config.schema import Config
from mf_scale.errors import UserError
from mf_scale.plan.states import Tensors
from mf_scale.plan.written import SavedModel, list_saved

PRODUCT = "mask product"
"""The part that is no module: the last layer's embeddings times the pixel embeddings."""


@dataclass(frozen=True)
class Part:
    """One part of the model."""

    name: str
    parameters: int
    """With the weights that a frozen batch norm keeps as buffers."""
    trainable: int
    flops: int
    """Forward, one image."""


def count_parts(config: Config, *, where: str = "configuration") -> tuple[Part, ...]:
    """Parameters and FLOPs of the model's parts, in their order, and of the mask product.

    UserError without model.num_classes, and for a model that cannot be built or run without memory.
    """
    return look_at_model(config, where=where)[0]


def look_at_model(config: Config, *, where: str = "configuration") -> tuple[tuple[Part, ...], Tensors, SavedModel]:
    """`count_parts`, the tensors that ZeRO partitions and those that checkpoints have; raises as it does."""
    if config.model.num_classes is None:
        raise UserError(
            "model.num_classes is not set, and there is no index of data.train here to tell it",
            where=where,
            remedy="Give it, for example model.num_classes=133.",
        )
    try:
        model = bare_model(config)
        return _count(model, config.data.crop), list_tensors(model, config), saved_model(model, config)
    except UserError:
        raise
    except Exception as error:  # timm's models and users' builders may refuse in any way; the reason is passed on
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the model cannot be counted on torch's meta device: {type(error).__name__} {first}", where=where
        ) from error


def bare_model(config: Config) -> Any:
    """The model on the meta device; model.num_classes is set."""
    import torch

    from mf_scale.models.build import build_model

    bare = replace(config.model, backbone=replace(config.model.backbone, weights="none"))
    with torch.device("meta"):
        return build_model(bare, int(config.model.num_classes or 0), seed=0)


def list_tensors(model: Any, config: Config) -> Tensors:
    """What ZeRO partitions of `model`, an nn.Module, in the optimizer's order."""
    from mf_scale.training.optimizer import parameter_groups

    groups = parameter_groups(model, config.optimizer)
    return Tensors(
        groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
        frozen=tuple(p.numel() for p in model.parameters() if not p.requires_grad),
        buffers=sum(b.nbytes for b in model.buffers()),
        saved=sum(value.nbytes for value in model.state_dict().values()),
    )


def saved_model(model: Any, config: Config) -> SavedModel:
    """What a checkpoint of `model`, an nn.Module, has of it."""
    from mf_scale.training.optimizer import parameter_groups

    return list_saved(model, [group["params"] for group in parameter_groups(model, config.optimizer)])


def sum_of(parts: Sequence[Part]) -> Part:
    """All parts as one."""
    return Part("sum", sum(p.parameters for p in parts), sum(p.trainable for p in parts), sum(p.flops for p in parts))


def _count(model: Any, crop: Sequence[int]) -> tuple[Part, ...]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mf_scale.models.outputs import PixelPrediction

    # On the meta device attention is torch's SDPA, counted as the two products it is, whatever kernel trains.
    model.eval()
    with torch.device("meta"), torch.no_grad():
        image = torch.empty(1, 3, *crop)
        with FlopCounterMode(display=False) as forward:
            prediction = model(image)
        with FlopCounterMode(display=False) as classes:
            if not isinstance(prediction, PixelPrediction):  # the loss multiplies for all layers
                prediction.classifier.logits(prediction.stacked().class_embeddings)
        with FlopCounterMode(display=False) as product:
            if isinstance(prediction, PixelPrediction):
                prediction.logits()
            else:
                torch.einsum("bqc,bchw->bqhw", prediction.mask_embeddings, prediction.pixel_embeddings)
    counts = forward.get_flop_counts()
    of_child = {
        name: sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) for name, _ in model.named_children()
    }
    outside = forward.get_total_flops() - sum(of_child.values())
    of_child["heads"] = of_child.get("heads", 0) + classes.get_total_flops()
    parts = [_part(name, child, of_child[name]) for name, child in model.named_children()]
    own = sum(p.numel() for p in model.parameters(recurse=False))
    listed = [part for part in (*parts, Part("other", own, own, outside)) if part.parameters or part.flops]
    return (*listed, Part(PRODUCT, 0, 0, product.get_total_flops()))


def _part(name: str, module: Any, flops: int) -> Part:
    """`module` is an nn.Module; torch is not imported for its name."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    frozen = sum(b.numel() for n, b in module.named_buffers() if n.rpartition(".")[2] in ("weight", "bias"))
    return Part(name.replace("_", " "), trainable + fixed + frozen, trainable, flops)
