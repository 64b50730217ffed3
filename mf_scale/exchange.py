"""Models from and to other programs: transformers' MaskFormer folders, and checkpoints of the original MaskFormer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mf_scale.bundle import new_folder, refuse_used_folder, write_bundle
from mf_scale.config.consent import belongs_to_a_checkpoint, refuse_unasked_code
from mf_scale.config.load import load_config
from mf_scale.config.schema import Config, ModelConfig
from mf_scale.config.validate import check_vocabulary, validate
from mf_scale.errors import UserError
from mf_scale.models.build import build_model
from mf_scale.models.exchange import detectron2_names, transformers_config, transformers_names
from mf_scale.models.exchange.families import FAMILIES, ResNet, Swin, family
from mf_scale.models.exchange.fit import Fit, fit
from mf_scale.models.exchange.links import Link
from mf_scale.models.weights import compare, read_weights
from mf_scale.rundir import MANIFEST, read_json
from mf_scale.training.tensor_file import write_tensors
from mf_scale.vocabulary import ClassInfo, Vocabulary

_CONFIG_JSON = "config.json"
_PREPROCESSOR_JSON = "preprocessor_config.json"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_CLASS_BIAS = "heads.class_head.bias"


@dataclass(frozen=True)
class _Names:
    """Another program's naming scheme."""

    program: str
    prefix: str
    """What a name starts with that only this program has."""
    links: Callable[..., list[Link]]
    usual: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Names of other versions of the program into those of `links`."""
    without_use: Callable[[str], str | None]
    caveat: Callable[[ModelConfig, ResNet | Swin], str | None] = lambda *_: None
    """What has to be said about a backbone of theirs."""


_SCHEMES = (
    _Names(
        "transformers",
        "model.pixel_level_module.",
        transformers_names.transformers_links,
        transformers_names.on_disk,
        transformers_names.without_use,
    ),
    _Names(
        "the original MaskFormer",
        "sem_seg_head.",
        detectron2_names.detectron2_links,
        detectron2_names.as_saved_today,
        detectron2_names.without_use,
        detectron2_names.caveat,
    ),
)


def import_model(
    source: Path, out: Path, *, config: str | None, vocabulary: str | None, overrides: Sequence[str]
) -> str:
    """Write the model of `source` as a bundle into the folder `out`; a text to print.

    `source` is a transformers folder, a checkpoint of the original MaskFormer (.pkl, .pth), or a file in our names.
    Configuration and vocabulary are a folder's own where none are given. UserError for whatever does not fit, with
    a table of the tensors.
    """
    refuse_used_folder(out)
    described = _described(source)
    if config is None and described is None:
        raise _lacking("--config CONFIG", "a file holds no description of its model", source)
    if vocabulary is None and described is None:
        raise _lacking("--vocabulary FILE", "a file does not say what its classes are called", source)
    derived, notes = _settings(described, source) if config is None and described is not None else ([], [])
    whole = load_config(config, [*derived, *overrides])
    validate(whole)
    if config is not None and belongs_to_a_checkpoint(Path(config)):
        refuse_unasked_code(whole, overrides, Path(config))
    whole = _without_pretraining(whole)
    classes = Vocabulary.load(vocabulary) if vocabulary is not None else _things(described or {}, source)
    count = check_vocabulary(whole, classes, where=vocabulary or str(source))
    if described is not None and vocabulary is None:
        notes.append("config.json does not say which classes are stuff: all are things (--vocabulary FILE says it)")
    model = build_model(whole.model, count, seed=whole.seed)
    notes += _other_images(model, source)
    fitted = _fit(model, whole, read_weights(source) if described is None else _read_folder(source), source)
    _refuse_other_classes(fitted, classes, source)
    if not fitted.report.complete:
        raise UserError(
            f"the weights do not fit the model:\n{fitted.report.table()}\n",
            where=str(source),
            remedy=f"{config or _CONFIG_JSON} describes another model.",
        )
    model.load_state_dict(fitted.tensors, strict=False)  # completeness was checked; only counters can be missing
    write_bundle(out, model.state_dict(), whole, classes, step=0)
    return "\n".join([f"read: {source}", fitted.report.table(), *fitted.notes, *notes, f"written: {out}"])


def write_transformers_folder(model: nn.Module, config: Config, vocabulary: Vocabulary, folder: Path) -> None:
    """Write `model` as a folder that transformers' MaskFormerForInstanceSegmentation.from_pretrained opens.

    `config` is the model's configuration, and `vocabulary` names its classes. UserError for a model that class cannot
    be (each reason named) and for a folder that is not empty.
    """
    backbone = transformers_config.expressible(config.model)
    pixels: Any = model.backbone
    preprocessor = transformers_config.preprocessor_json(
        config.model, config.eval, pixels.mean, pixels.std, len(vocabulary)
    )
    described = transformers_config.model_json(config.model, config.loss, backbone, vocabulary.names)
    tensors = transformers_names.export_tensors(
        config.model, backbone, model.state_dict(), config.loss.no_object_weight
    )
    with new_folder(folder) as place:
        write_tensors(place / _WHOLE[0], tensors, {"format": "pt"})
        for name, content in ((_CONFIG_JSON, described), (_PREPROCESSOR_JSON, preprocessor)):
            (place / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_pretraining(config: Config) -> Config:
    """The backbone's own weights would be overwritten at once."""
    if config.model.pixel_level.builder is not None:
        return config
    return replace(config, model=replace(config.model, backbone=replace(config.model.backbone, weights="none")))


def _described(source: Path) -> dict[str, Any] | None:
    """config.json of a transformers folder, or None for a file; UserError for any other folder and for nothing."""
    if not source.exists():
        raise UserError("there is neither a file nor a folder", where=str(source), remedy="Check the path.")
    if not source.is_dir():
        return None
    if (source / MANIFEST).is_file():
        raise UserError(
            "this is a checkpoint of mf_scale already", where=str(source), remedy="Use it as it is: it needs no import."
        )
    if not (source / _CONFIG_JSON).is_file():
        raise UserError(
            f"the folder holds no {_CONFIG_JSON}, so it is no model of transformers",
            where=str(source),
            remedy="Name such a folder, or a file of weights.",
        )
    return read_json(source / _CONFIG_JSON)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in _WHOLE:
        if (folder / name).is_file():
            return read_weights(folder / name)
    for name in _INDEX:
        if (folder / name).is_file():
            files = read_json(folder / name).get("weight_map")
            if not isinstance(files, dict):
                raise UserError("the index of the weights has no weight_map", where=str(folder / name))
            # only the last part of a name: an index does not lead out of its folder
            shards = sorted({Path(str(file)).name for file in files.values()})
            return {name: tensor for shard in shards for name, tensor in read_weights(folder / shard).items()}
    raise UserError(f"the folder holds no weights: none of {', '.join((*_WHOLE, *_INDEX))}", where=str(folder))


def _settings(described: Mapping[str, Any], source: Path) -> tuple[list[str], list[str]]:
    """What a transformers folder says of its model as key=value, and what is to be said about it."""
    where = str(source / _CONFIG_JSON)
    settings = transformers_config.settings(described, where)
    preprocessor = source / _PREPROCESSOR_JSON
    if preprocessor.is_file():
        settings |= transformers_config.inference_settings(read_json(preprocessor))
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return overrides, transformers_config.differences(described)


def _other_images(model: nn.Module, source: Path) -> list[str]:
    """A note where the source's images are normalised otherwise than the model's."""
    preprocessor = source / _PREPROCESSOR_JSON
    if not preprocessor.is_file():
        return []
    given, pixels = read_json(preprocessor), cast("Any", model.backbone)
    return [
        f"{preprocessor.name}: {key} = {given[key]}, here it is {list(own)}: predictions will differ"
        for key, own in (("image_mean", pixels.mean), ("image_std", pixels.std))
        if key in given and given[key] != list(own)
    ]


def _things(described: Mapping[str, Any], source: Path) -> Vocabulary:
    names = transformers_config.class_names(described, str(source / _CONFIG_JSON))
    data = {"name": source.resolve().name, "classes": [vars(ClassInfo(n, True, i)) for i, n in enumerate(names)]}
    return Vocabulary.from_dict(data, where=str(source / _CONFIG_JSON))


def _fit(model: nn.Module, config: Config, given: dict[str, Tensor], source: Path) -> Fit:
    """The tensors under our names, whichever names they came with."""
    own = model.state_dict()
    scheme = next((s for s in _SCHEMES if any(name.startswith(s.prefix) for name in given)), None)
    if scheme is None:  # our own names, or none that are known
        return Fit({name: t for name, t in given.items() if name in own}, compare(own, given), ())
    backbone = _known_family(config, scheme.program, source)
    fitted = fit(own, scheme.links(config.model, backbone), scheme.usual(given), scheme.without_use)
    caveat = scheme.caveat(config.model, backbone)
    return replace(fitted, notes=(*fitted.notes, caveat)) if caveat else fitted


def _known_family(config: Config, program: str, source: Path) -> ResNet | Swin:
    backbone = family(config.model.backbone.name)
    if backbone is None or config.model.kind != "mask_classification" or config.model.pixel_level.builder is not None:
        raise UserError(
            f"the names of {program} are known for MaskFormer with these backbones only: {', '.join(FAMILIES)}",
            where=str(source),
            remedy="Set model.backbone.name to the file's backbone.",
        )
    return backbone


def _refuse_other_classes(fitted: Fit, vocabulary: Vocabulary, source: Path) -> None:
    bias = fitted.tensors.get(_CLASS_BIAS)
    if bias is not None and len(bias) != len(vocabulary) + 1:
        raise UserError(
            f"the weights know {len(bias) - 1} classes, but vocabulary {vocabulary.name!r} has {len(vocabulary)}",
            where=str(source),
            remedy="Give --vocabulary FILE with the classes the model was trained on.",
        )


def _lacking(option: str, why: str, source: Path) -> UserError:
    return UserError(
        f"{option} is needed: {why}", where=str(source), remedy="Only a folder of transformers has its own."
    )
