"""Read a configuration: base files < file < dot-list. Unknown keys are errors that name the nearest known key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mf_scale.config.explain import describe, did_you_mean
from mf_scale.config.schema import Config
from mf_scale.config.urls import SECRET_WORDS
from mf_scale.errors import UserError

BASE_KEY = "base"
"""A file's list of files it builds on, relative to itself; later ones win."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of `path` with dot-list `overrides` (`train.steps=5`) on top; raises UserError."""
    layers = list(_file_layers(Path(path))) if path is not None else []
    if overrides:
        layers.append(("command line", _parse_overrides(overrides)))
    return _merge(layers)


def config_files(path: str | Path) -> list[Path]:
    """The file and all that it builds on; raises UserError."""
    return [Path(name) for name, _ in _file_layers(Path(path))]


def is_overridden(overrides: Sequence[str], key: str) -> bool:
    """Whether the dot-list itself gives `key`."""
    node: Any = _parse_overrides(overrides) if overrides else {}
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def config_from_dict(data: Mapping[str, Any], *, where: str) -> Config:
    """The configuration that `config_to_dict` wrote; raises UserError."""
    return _merge([(where, data)])


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain dictionaries and lists, every field present."""
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.structured(config)))


def config_to_yaml(config: Config) -> str:
    """The effective configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _merge(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    merged = OmegaConf.structured(Config)
    for where, data in layers:
        problems = list(_unknown_keys(data, Config, "")) + list(_secrets(data, ""))
        if problems:
            raise UserError(" ".join(problems), where=where, remedy="Nothing was started.")
        merged = _merge_layer(merged, data, where)
    try:
        config = cast("Config", OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error), where=layers[-1][0] if layers else "defaults") from error
    problems = list(_bad_choices(config, ""))
    if problems:
        raise UserError(
            " ".join(problems), where=layers[-1][0] if layers else "defaults", remedy="Nothing was started."
        )
    return config


def _merge_layer(merged: DictConfig, data: Mapping[str, Any], where: str) -> DictConfig:
    try:
        return cast("DictConfig", OmegaConf.merge(merged, data))
    except TypeError as error:
        raise UserError(
            f"the values do not fit their keys: {_one_line(error)}",
            where=where,
            remedy="Lists are given whole, for example data.crop=[512,512].",
        ) from error
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        value = _lookup(data, key)
        raise UserError(
            f"{key} = {value!r} is not accepted: {_one_line(error)}",
            where=where,
            remedy=f"{key} takes {describe(key)}.",
        ) from error


def _file_layers(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    resolved = path.resolve()
    if resolved in seen:
        raise UserError("configuration files build on each other in a circle", where=str(path))
    data = _read_yaml(path)
    bases = data.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"`{BASE_KEY}` must name a file or a list of files, not {bases!r}", where=str(path))
    for base in bases:
        yield from _file_layers(path.parent / base, (*seen, resolved))
    yield str(path), data


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("the configuration file does not exist", where=str(path), remedy=_nearby_files(path)) from error
    except IsADirectoryError as error:
        raise UserError(
            "the configuration is a folder, not a file", where=str(path), remedy=_nearby_files(path / "x")
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration file cannot be read: {error}", where=str(path)) from error
    except yaml.YAMLError as error:
        raise UserError(f"the configuration file is not YAML: {_one_line(error)}", where=str(path)) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError("the configuration file does not hold sections and keys", where=str(path))
    return data


def _nearby_files(path: Path) -> str:
    folder = path.parent
    names = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    return f"{folder} holds: {', '.join(names[:12])}." if names else f"There is no configuration in {folder}."


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            raise UserError(
                f"{item!r} is not key=value", where="command line", remedy="Write for example train.steps=500."
            )
    try:
        return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides))))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"the overrides cannot be read: {_one_line(error)}", where="command line") from error


def _unknown_keys(data: Mapping[str, Any], schema: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(schema)
    for key, value in data.items():
        full = f"{prefix}{key}"
        if key not in hints:
            for name in _leaves(value, full):
                yield f"{name} is not a key.{did_you_mean(name)}"
        elif is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                yield from _unknown_keys(value, cast("type", hints[key]), f"{full}.")
            else:
                yield f"{full} is a section, it cannot be {value!r}."


def _leaves(value: Any, full: str) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{full}.{key}")
    else:
        yield full


def _secrets(data: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _secrets(value, f"{prefix}{key}.")
        elif any(word in str(key).lower() for word in SECRET_WORDS):
            yield f"{prefix}{key} looks like a secret: it belongs in the environment (WANDB_API_KEY), not here."
        elif isinstance(value, str) and "${oc.env:" in value:
            yield f"{prefix}{key} reads the environment, but it would be written to disk: write the value itself."
        elif isinstance(value, str) and re.search(r"://[^/@]+:[^/@]+@", value):
            yield f"{prefix}{key} holds a password in its url: credentials belong in the environment."


def _bad_choices(node: Any, prefix: str) -> Iterator[str]:
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _bad_choices(value, f"{prefix}{item.name}.")
        elif "choices" in item.metadata and value not in item.metadata["choices"]:
            options = item.metadata["choices"]
            near = difflib.get_close_matches(str(value), [str(o) for o in options], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            yield f"{prefix}{item.name} = {value!r}: it takes {', '.join(map(str, options))}.{hint}"


def _lookup(data: Mapping[str, Any], key: str) -> Any:
    node: Any = data
    for part in key.split("[", maxsplit=1)[0].split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type"))]
    return " ".join(kept) or type(error).__name__
