"""Say what a configuration key is: its fields, its type in words, the nearest known name."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from mf_scale.config.schema import Config


def schema_fields(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Every leaf of the schema with its dotted name."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        if is_dataclass(hints[item.name]):
            yield from schema_fields(cast("type", hints[item.name]), f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


def did_you_mean(full: str) -> str:
    """A sentence with the known keys nearest to `full`."""
    known = {name: _likeness(full, name) for name, _ in schema_fields()}
    best = max(known.values())
    close = sorted((name for name in known if known[name] > max(0.6, 0.95 * best)), key=lambda name: -known[name])[:2]
    return f" Did you mean {' or '.join(close)}?" if close else " See configs/base.yaml for all keys."


def _likeness(full: str, name: str) -> float:
    """How alike two dotted names are, in 0..1; a last part that is alike counts nearly as much as the whole."""
    whole = difflib.SequenceMatcher(None, full, name).ratio()
    last = difflib.SequenceMatcher(None, full.rpartition(".")[2], name.rpartition(".")[2]).ratio()
    return max(whole, 0.9 * last)


def describe(key: str) -> str:
    """What `key` takes, in words, with its default."""
    by_name = dict(schema_fields())
    if key.split("[", maxsplit=1)[0] not in by_name:
        return "another kind of value"
    item = by_name[key.split("[", maxsplit=1)[0]]
    kind = _type_name(item)
    default = item.default if item.default is not MISSING else cast("Any", item.default_factory)()
    return f"{kind} (default {default!r})"


def _type_name(item: Field[Any]) -> str:
    text = item.type if isinstance(item.type, str) else _annotation_name(item.type)
    optional = text.startswith("Optional[")
    inner = text.removeprefix("Optional[").removesuffix("]") if optional else text
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    words |= {"list[int]": "a list of whole numbers like [512,512]", "list[float]": "a list of numbers like [0.5,2.0]"}
    return words.get(inner, inner) + (" or null" if optional else "")


def _annotation_name(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        inner = next(a for a in get_args(annotation) if a is not type(None))
        return f"Optional[{_annotation_name(inner)}]"
    return getattr(annotation, "__name__", str(annotation))
