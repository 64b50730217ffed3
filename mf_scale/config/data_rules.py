"""Rules of the data section: sources, repeats, cache. Pure; see `validate.py`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from mf_scale.config.schema import Config, DataConfig, SourceConfig
from mf_scale.config.urls import scheme_of
from mf_scale.errors import UserError

LEAST_WEIGHT = 1e-6
"""Below it, or above its inverse, sums of weights lose what they are for."""
LEAST_CACHE = 0.25
"""GiB: 64 pieces, so that making room does not throw out what is being read."""


_OF_VALIDATION = ("index", "vocabulary", "map")


def validation_source(data: DataConfig) -> SourceConfig | None:
    """data.val, which is text or a mapping, as a source; UserError for anything else."""
    if data.val is None:
        return None
    if isinstance(data.val, str):
        return SourceConfig(index=data.val)
    broken = _validation_form(data.val)
    if broken:
        raise UserError(broken, where="configuration", remedy="Write data.val=FOLDER or {index, vocabulary, map}.")
    return SourceConfig(**data.val)


def _validation_form(said: Any) -> str:
    """What is wrong with the form of data.val; empty: nothing."""
    if not isinstance(said, (str, Mapping)):
        return f"data.val = {said!r} is neither a folder nor a mapping"
    if isinstance(said, str):
        return ""
    for key in said.keys() - set(_OF_VALIDATION):
        near = difflib.get_close_matches(str(key), _OF_VALIDATION, n=1)
        return f"data.val.{key} is not a key." + (f" Did you mean {near[0]}?" if near else "")
    if not isinstance(said.get("index"), str):
        return "data.val.index is missing: it names the folder (or url) of the validation source"
    if not isinstance(said.get("vocabulary"), (str, type(None))):
        return f"data.val.vocabulary = {said['vocabulary']!r} must be text"
    return ""


def _validation(config: Config) -> list[str]:
    said = config.data.val
    broken = _validation_form(said) if said is not None else ""
    if broken or said is None:
        return [broken] if broken else []
    source = validation_source(config.data)
    return [] if source is None else _source("data.val", source)


def _source(name: str, source: SourceConfig) -> list[str]:
    """What is wrong with a source, whatever it is for."""
    index, broken = (name if name == "data.val" else f"{name}.index"), []
    if not source.index.strip():
        broken.append(f"{index} is empty: it names the folder (or url) of a source")
    for said, path in ((index, source.index), (f"{name}.vocabulary", source.vocabulary), (f"{name}.map", source.map)):
        if isinstance(path, str) and path.startswith("~"):
            broken.append(f"{said} = {path}: ~ is not expanded here, write the whole path")
    if source.map is not None and not isinstance(source.map, (str, Mapping)):
        broken.append(f"{name}.map = {source.map!r} must be {{CLASS: UNIFIED NAME or null, ...}} or a JSON file")
    return broken


def _merges(config: Config) -> list[str]:
    data, broken = config.data, []
    for table in data.merge:
        if not table.strip() or table.startswith("~"):
            broken.append(f"data.merge holds {table!r}: name a bundled table or a file (~ is not expanded here)")
        elif data.merge.count(table) > 1:
            broken.append(f"data.merge names {table} twice")
    return list(dict.fromkeys(broken))


def _sources(config: Config) -> list[str]:
    data, broken = config.data, []
    if data.train is not None and data.sources:
        broken.append("data.train and data.sources both name training sources: put all of them into data.sources")
    for place, source in enumerate(data.sources):
        broken += _source(f"data.sources[{place}]", source)
        if not LEAST_WEIGHT <= source.weight <= 1 / LEAST_WEIGHT:
            broken.append(f"data.sources[{place}].weight = {source.weight:g} must be above 0, from 1e-6 to 1e6")
    return broken


def _urls(config: Config) -> list[str]:
    """Here, and not where a source is opened, because by then the configuration with the url was written down."""
    data, broken = config.data, []
    val = data.val.get("index") if isinstance(data.val, Mapping) else data.val
    given = {"data.train": data.train, "data.val": val if isinstance(val, str) else None}
    given |= {f"data.sources[{place}].index": source.index for place, source in enumerate(data.sources)}
    for name, url in given.items():
        try:
            scheme_of(url or "")
        except UserError as error:
            broken.append(f"{name}: {error}")
    return broken


def _repeats(config: Config) -> list[str]:
    threshold = config.data.repeat_threshold
    if 0 <= threshold <= 1:
        return []
    return [f"data.repeat_threshold = {threshold:g} is a share of images: 0 (no repeats) to 1, for example 0.001"]


def _cache(config: Config) -> list[str]:
    data = config.data
    if data.cache_dir is None:
        if data.cache_gib != DataConfig().cache_gib:
            return [f"data.cache_gib = {data.cache_gib:g} does nothing without data.cache_dir"]
        return []
    broken = []
    if not data.cache_dir.strip() or data.cache_dir.startswith("~"):
        broken.append(f"data.cache_dir = {data.cache_dir!r} must be a folder, written whole (~ is not expanded here)")
    if not (data.cache_gib >= LEAST_CACHE and math.isfinite(data.cache_gib)):
        broken.append(f"data.cache_gib = {data.cache_gib:g} must be {LEAST_CACHE:g} at least: it keeps pieces of 4 MiB")
    return broken


DATA_RULES = (_sources, _validation, _merges, _urls, _repeats, _cache)
