"""Rules of the data section: sources, repeats, cache. Pure; see `validate.py`."""

from __future__ import annotations

import math

from mf_scale.config.schema import Config, DataConfig
from mf_scale.config.urls import scheme_of
from mf_scale.errors import UserError

LEAST_WEIGHT = 1e-6
"""Below it, or above its inverse, sums of weights lose what they are for."""
LEAST_CACHE = 0.25
"""GiB: 64 pieces, so that making room does not throw out what is being read."""


def _sources(config: Config) -> list[str]:
    data, broken = config.data, []
    if data.train is not None and data.sources:
        broken.append("data.train and data.sources both name training sources: put all of them into data.sources")
    for place, source in enumerate(data.sources):
        if not source.index.strip():
            broken.append(f"data.sources[{place}].index is empty: it names the folder (or url) of a source")
        if source.index.startswith("~"):
            broken.append(f"data.sources[{place}].index = {source.index}: ~ is not expanded here, write the whole path")
        if not LEAST_WEIGHT <= source.weight <= 1 / LEAST_WEIGHT:
            broken.append(f"data.sources[{place}].weight = {source.weight:g} must be above 0, from 1e-6 to 1e6")
    return broken


def _urls(config: Config) -> list[str]:
    """Here, and not where a source is opened, because by then the configuration with the url was written down."""
    data, broken = config.data, []
    given = {"data.train": data.train, "data.val": data.val}
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


DATA_RULES = (_sources, _urls, _repeats, _cache)
