"""config.json and preprocessor_config.json of a transformers MaskFormer folder, from our configuration and back.

Source: transformers, MaskFormerConfig, ResNetConfig, MaskFormerSwinConfig, DetrConfig, MaskFormerImageProcessor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mf_scale.config.schema import EvalConfig, LossConfig, ModelConfig
from mf_scale.errors import UserError
from mf_scale.models.exchange.families import FAMILIES, ResNet, Swin, family, name_of

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_GROUPS = 32
"""Groups of their FPN's group norm; ours has as many where the width is a multiple of it."""
_FIXED: dict[str, dict[str, Any]] = {
    "resnet": {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False},
    "swin": {
        "hidden_act": "gelu",
        "mlp_ratio": 4.0,
        "patch_size": 4,
        "qkv_bias": True,
        "use_absolute_embeddings": False,
        "layer_norm_eps": 1e-5,
    },
    "detr": {"activation_function": "relu"},
}
"""Settings of theirs that a model here has in one value only; the same values are their defaults."""


def expressible(config: ModelConfig) -> ResNet | Swin:
    """The backbone's family, if their class can be this model; UserError naming everything it cannot be."""
    backbone = family(config.backbone.name)
    problems = []
    if config.kind != "mask_classification":
        problems.append(f"model.kind = {config.kind}")
    if config.pixel_level.builder is not None:
        problems.append(f"model.pixel_level.builder = {config.pixel_level.builder}")
    elif backbone is None or (isinstance(backbone, ResNet) and backbone.deep_stem):
        problems.append(f"model.backbone.name = {config.backbone.name} (it has ResNets and Swin Transformers)")
    if config.backbone.multi_grid:
        problems.append(f"model.backbone.multi_grid = {config.backbone.multi_grid} (it dilates nothing)")
    if config.pixel_decoder.encoder_layers:
        problems.append(f"model.pixel_decoder.encoder_layers = {config.pixel_decoder.encoder_layers} (it has none)")
    if config.pixel_decoder.width % _GROUPS:
        problems.append(f"model.pixel_decoder.width = {config.pixel_decoder.width} (not a multiple of {_GROUPS})")
    if config.class_embeddings is not None:
        problems.append(f"model.class_embeddings = {config.class_embeddings} (its class head is linear)")
    if config.decoder.pre_norm:
        problems.append("model.decoder.pre_norm = true (it normalises after the sum)")
    if problems or backbone is None:
        raise UserError(
            f"transformers' MaskFormerForInstanceSegmentation cannot be this model: {'; '.join(problems)}",
            remedy="Export it as safetensors, torch or onnx.",
        )
    return backbone


def model_json(config: ModelConfig, loss: LossConfig, backbone: ResNet | Swin, names: Sequence[str]) -> dict[str, Any]:
    """Their config.json. Dropout: the one rate here is three there."""
    decoder, rate = config.decoder, config.decoder.dropout
    return {
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "model_type": "maskformer",
        "backbone_config": _resnet_json(backbone) if isinstance(backbone, ResNet) else _swin_json(backbone, config),
        "decoder_config": {
            "model_type": "detr",
            "num_queries": decoder.queries,
            "d_model": decoder.width,
            "decoder_layers": decoder.layers,
            "decoder_attention_heads": decoder.heads,
            "decoder_ffn_dim": decoder.feedforward,
            "encoder_attention_heads": decoder.heads,
            "dropout": rate,
            "attention_dropout": rate,
            "activation_dropout": rate,
            **_FIXED["detr"],
        },
        "fpn_feature_size": config.pixel_decoder.width,
        "mask_feature_size": config.pixel_decoder.mask_channels,
        "cross_entropy_weight": loss.class_weight,
        "mask_weight": loss.focal_weight,
        "dice_weight": loss.dice_weight,
        "no_object_weight": loss.no_object_weight,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def preprocessor_json(
    config: ModelConfig, inference: EvalConfig, mean: Sequence[float], std: Sequence[float], classes: int
) -> dict[str, Any]:
    """Their preprocessor_config.json. Its images are resized to multiples of size_divisor, where ours are padded."""
    return {
        "image_processor_type": "MaskFormerImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": inference.short_side, "longest_edge": inference.max_side},
        "size_divisor": config.size_divisor if config.size_divisor > 1 else 0,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "ignore_index": 255,
        "do_reduce_labels": False,
        "num_labels": classes,
    }


def settings(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our keys and values that say the same as their config.json; UserError for what cannot be built here."""
    if data.get("model_type") != "maskformer":
        raise UserError(
            f"config.json describes a {data.get('model_type')!r} model, not a maskformer",
            where=where,
            remedy="Name the folder of a MaskFormerForInstanceSegmentation.",
        )
    decoder, backbone = _section(data, "decoder_config", where), _section(data, "backbone_config", where)
    _refuse_other_values(decoder, "detr", where)
    name = _backbone_name(backbone, where)
    values = {
        "model.backbone.name": name,
        "model.backbone.weights": "none",
        "model.pixel_decoder.width": data.get("fpn_feature_size", 256),
        "model.pixel_decoder.mask_channels": data.get("mask_feature_size", 256),
        "model.decoder.layers": decoder.get("decoder_layers", 6),
        "model.decoder.queries": decoder.get("num_queries", 100),
        "model.decoder.width": decoder.get("d_model", 256),
        "model.decoder.heads": decoder.get("decoder_attention_heads", 8),
        "model.decoder.feedforward": decoder.get("decoder_ffn_dim", 2048),
        "model.decoder.dropout": decoder.get("dropout", 0.1),
        "loss.class_weight": data.get("cross_entropy_weight", 1.0),
        "loss.focal_weight": data.get("mask_weight", 20.0),
        "loss.dice_weight": data.get("dice_weight", 1.0),
        "loss.no_object_weight": data.get("no_object_weight", 0.1),
    }
    if isinstance(family(name), Swin):
        values["model.backbone.drop_path"] = backbone.get("drop_path_rate", 0.1)
    return values


def inference_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys and values for the sizes of their preprocessor_config.json, in today's form or the older one."""
    size, divisor = data.get("size"), data.get("size_divisor", data.get("size_divisibility", 32))
    sides = size if isinstance(size, Mapping) else {"shortest_edge": size, "longest_edge": data.get("max_size")}
    values = {
        "eval.short_side": sides.get("shortest_edge"),
        "eval.max_side": sides.get("longest_edge"),
        "model.size_divisor": 1 if divisor == 0 else divisor,
    }
    return {key: value for key, value in values.items() if value is not None}


def differences(data: Mapping[str, Any]) -> list[str]:
    """Sentences about what their configuration says and a model here does otherwise."""
    decoder, notes = data["decoder_config"], []
    if decoder.get("auxiliary_loss"):
        notes.append(
            "decoder_config.auxiliary_loss: transformers then normalises between the decoder's layers, which neither "
            "the paper nor mf_scale does: the logits differ from those of transformers"
        )
    rate = decoder.get("dropout", 0.1)
    others = {key: decoder.get(key, 0.0) for key in ("attention_dropout", "activation_dropout")}
    if any(other != rate for other in others.values()):
        notes.append(f"in training: {others} there, but here model.decoder.dropout = {rate} is for all of them")
    return notes


def class_names(data: Mapping[str, Any], where: str) -> list[str]:
    """The names of id2label in the order of their ids; UserError where ids are missing."""
    labels = data.get("id2label")
    try:
        by_id = {int(key): str(name) for key, name in labels.items()}  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError("config.json has no id2label", where=where, remedy="Give --vocabulary FILE.") from error
    if sorted(by_id) != list(range(len(by_id))):
        raise UserError("the ids of id2label in config.json are not 0, 1, 2 and so on", where=where)
    return [by_id[i] for i in range(len(by_id))]


def _resnet_json(backbone: ResNet) -> dict[str, Any]:
    return {
        "model_type": "resnet",
        "embedding_size": 64,
        "hidden_sizes": list(backbone.widths),
        "depths": list(backbone.depths),
        "layer_type": "bottleneck" if backbone.bottleneck else "basic",
        "out_features": _STAGES,
        **_FIXED["resnet"],
    }


def _swin_json(backbone: Swin, config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "swin",
        "embed_dim": backbone.width,
        "depths": list(backbone.depths),
        "num_heads": list(backbone.heads),
        "window_size": backbone.window,
        "image_size": 32 * backbone.window,
        "drop_path_rate": config.backbone.drop_path,
        "hidden_dropout_prob": config.backbone.dropout,
        "attention_probs_dropout_prob": config.backbone.attention_dropout,
        "out_features": _STAGES,
        **_FIXED["swin"],
    }


def _backbone_name(data: Mapping[str, Any], where: str) -> str:
    kind = str(data.get("model_type", "")).removeprefix("maskformer-")
    try:
        made = {"resnet": _read_resnet, "swin": _read_swin}[kind](data)
    except (KeyError, TypeError):  # another kind; something else where a list should be
        made = None
    name = name_of(made) if made is not None else None
    if name is None:
        raise UserError(
            f"the backbone of config.json has no name here: {_summary(data)}",
            where=where,
            remedy=f"Those that have: {', '.join(FAMILIES)}.",
        )
    _refuse_other_values(data, kind, where)
    return name


def _read_resnet(data: Mapping[str, Any]) -> ResNet | None:
    made = ResNet(tuple(data.get("depths", (3, 4, 6, 3))), data.get("layer_type", "bottleneck") == "bottleneck")
    widths = (data.get("embedding_size", 64), *data.get("hidden_sizes", (256, 512, 1024, 2048)))
    return made if widths == (64, *made.widths) else None


def _read_swin(data: Mapping[str, Any]) -> Swin:
    depths, heads = data.get("depths", (2, 2, 6, 2)), data.get("num_heads", (3, 6, 12, 24))
    return Swin(data.get("embed_dim", 96), tuple(depths), tuple(heads), data.get("window_size", 7))


def _section(data: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = data.get(name)
    if not isinstance(section, Mapping):
        raise UserError(f"config.json has no {name}", where=where, remedy="Give --config CONFIG.")
    return section


def _refuse_other_values(data: Mapping[str, Any], kind: str, where: str) -> None:
    other = [
        f"{key} = {data[key]!r} (here {value!r})"
        for key, value in _FIXED[kind].items()
        if data.get(key, value) != value
    ]
    if other:
        raise UserError(f"config.json asks for what is not built here: {', '.join(other)}", where=where)


def _summary(data: Mapping[str, Any]) -> str:
    keys = ("model_type", "depths", "embed_dim", "num_heads", "window_size", "layer_type", "hidden_sizes", "backbone")
    return ", ".join(f"{key} {data[key]}" for key in keys if key in data)
