"""What is said of a merge: each unified class with its members, and the names that were meant."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mf_scale.unify.merge import Unified


def quoted(vocabulary: str, name: str) -> str:
    """A class of a vocabulary, as all lines write it."""
    return f'{vocabulary} "{name}"'


def nearest(name: str, known: Iterable[str]) -> str:
    """A question with the known names nearest to `name`, to begin a remedy with; empty where none is near."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"Did you mean {' or '.join(map(repr, close))}? " if close else ""


def listed(parts: list[str], limit: int = 5) -> str:
    """The first parts, and how many more there are."""
    more = f" and {len(parts) - limit:,} more" if len(parts) > limit else ""
    return ", ".join(parts[:limit]) + more


def merge_lines(unified: Unified) -> list[str]:
    """`person = ade20k_150 "person" + lvis_v1_1203 "person"`: every unified class of several source classes."""
    return [
        f"{info.name} = {' + '.join(quoted(*member) for member in members)}"
        for info, members in zip(unified.vocabulary.classes, unified.members, strict=True)
        if len(members) > 1
    ]


def apart_lines(unified: Unified) -> list[str]:
    """Names that several vocabularies have and nothing declares to be one class, with what became of each."""
    names = unified.vocabulary.names
    labels: dict[str, dict[int, str]] = defaultdict(dict)
    for label, members in enumerate(unified.members):
        for vocabulary, name in members:
            labels[name].setdefault(label, vocabulary)
    return [
        f'"{name}" is not one class: '
        + ", ".join(f'{vocabulary} has it as "{names[label]}"' for label, vocabulary in places.items())
        for name, places in labels.items()
        if len(places) > 1
    ]


def source_lines(unified: Unified) -> list[str]:
    """One line a source: how many of the unified classes it annotates, how many of its own are left out."""
    return [
        f"{source.where or f'source {place}'}: {source.vocabulary}, annotates {source.known.sum():,} of "
        f"{len(unified.vocabulary):,} classes, the others are unknown there"
        + (f"; left out: {listed(list(source.left_out))}" if source.left_out else "")
        for place, source in enumerate(unified.sources)
    ]


def describe(unified: Unified, limit: int = 10, whole: str = "") -> list[str]:
    """What a start prints: counts, sources, the first merges and the first names kept apart; `whole`: file of the rest.

    At most 2 * limit + 5 lines and one a source, at any size of the vocabulary.
    """
    merged, apart = merge_lines(unified), apart_lines(unified)
    classes = len(unified.vocabulary)
    lines = [
        f"unified vocabulary {unified.vocabulary.name!r}: {classes:,} classes, {len(merged):,} of them of several "
        f"source classes, {classes - len(merged):,} of one",
        *source_lines(unified),
    ]
    lines += _first(merged, limit, "merges", whole)
    if apart:
        lines.append(f"{len(apart):,} names stand in several vocabularies and nothing declares them to be one class:")
        lines += _first(apart, limit, "names", whole)
    return lines


def whole_text(unified: Unified) -> str:
    """Everything there is to say, for a file."""
    return "\n".join(describe(unified, max(len(unified.vocabulary), 1))) + "\n"


def _first(lines: list[str], limit: int, what: str, whole: str) -> list[str]:
    rest = len(lines) - limit
    more = [f"  ... and {rest:,} more {what}" + (f" in {whole}" if whole else "")] if rest > 0 else []
    return [f"  {line}" for line in lines[:limit]] + more
