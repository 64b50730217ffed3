"""Unified: the training sources seen through one vocabulary, and other sources mapped into it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mf_scale.config.schema import DataConfig, SourceConfig
from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.unify import MergeTable, Source, Unified, check_source, place, read_map, unify, with_bands
from mf_scale.vocabulary import Vocabulary


def seen_as_one(indexes: Sequence[Index], data: DataConfig) -> tuple[Index, ...]:
    """The training sources with the labels of one vocabulary: their own if they share it and nothing else is said.

    Raises UserError for sources that label differently of which nothing is declared, and for what cannot be meant.
    """
    said = list(data.sources) or [SourceConfig(index=data.train or "")]
    names = [_where(data, number) for number in range(len(said))]
    for index, source, where in zip(indexes, said, names, strict=True):
        check_source(index.vocabulary, source.vocabulary, where)
    seen = tuple(indexes)
    if _differ(indexes) or data.merge or any(source.map is not None for source in said):
        _refuse_undeclared(indexes, said, data)
        parts = [
            Source(index.vocabulary, where, read_map(source.map, f"{where}.map"))
            for index, source, where in zip(indexes, said, names, strict=True)
        ]
        unified = unify(parts, _tables(data), by_name=data.by_name)
        seen = tuple(
            index.seen_as(unified.vocabulary, way) for index, way in zip(indexes, unified.sources, strict=True)
        )
    if not data.bands:
        return seen
    images = np.sum([index.class_counts() for index in seen], axis=0)
    banded = with_bands(seen[0].vocabulary, images)
    return tuple(index.seen_as(banded, index.way) for index in seen)


def seen_in(vocabulary: Vocabulary, index: Index, source: SourceConfig, data: DataConfig, where: str) -> Index:
    """A source with the labels of a run's vocabulary; the classes that go nowhere in it are left out.

    The run's tables and trust in equal names hold for it as well, and its own map goes first. Raises UserError where it
    labels differently and nothing is declared of it.
    """
    check_source(index.vocabulary, source.vocabulary, where)
    said = read_map(source.map, f"{where}.map")
    known = {name for own in vocabulary.members for name, _ in own}
    if index.vocabulary.digest == vocabulary.digest and not said and index.vocabulary.name not in known:
        own = index.vocabulary if not (vocabulary.members or data.bands) else vocabulary
        return index if own is index.vocabulary else index.seen_as(own, None)
    declared = said or data.merge or data.by_name or index.vocabulary.name in known
    if not declared or (not vocabulary.members and index.vocabulary.name == vocabulary.name):
        pairs = zip(index.vocabulary.names, vocabulary.names, strict=False)
        other = next((f"; the first class that differs is {own!r}" for own, run in pairs if own != run), "")
        raise UserError(
            f"the source has vocabulary {index.vocabulary.name!r} ({len(index.vocabulary)} classes), the run "
            f"{vocabulary.name!r} ({len(vocabulary)} classes){other}",
            where=index.source,
            remedy="Pack it with the run's vocabulary, or say which classes are one: data.merge, data.by_name=true, or "
            "a map (docs/vocabularies.md).",
        )
    tables = [] if index.vocabulary.name in known else _tables(data)
    way = place(vocabulary, Source(index.vocabulary, where, said), tables, by_name=data.by_name)
    return index.seen_as(vocabulary, way)


def merges_of(indexes: Sequence[Index]) -> Unified | None:
    """What the vocabulary of some training sources was made of; None where it is their own."""
    vocabulary = indexes[0].vocabulary
    ways = [index.way for index in indexes if index.way is not None]
    return Unified(vocabulary, tuple(ways), vocabulary.members) if ways else None


def what_changed(before: Vocabulary, now: Vocabulary) -> str | None:
    """A sentence where the same classes are made of others than before; both have the same names."""
    changed = [
        info.name
        for info, old, new in zip(now.classes, before.members, now.members, strict=False)
        if set(old) != set(new)
    ]
    if not changed:
        return None
    return f"{len(changed):,} classes are made of other source classes than before: {', '.join(changed[:5])}" + (
        f" and {len(changed) - 5:,} more" if len(changed) > 5 else ""
    )


def way_note(index: Index, what: str) -> str | None:
    """A sentence on what a source that is not trained on does not annotate; None where it annotates everything."""
    if index.way is None or (index.way.known.all() and not index.way.left_out):
        return None
    way, left_out = index.way, index.way.left_out
    return (
        f"{what}: {way.vocabulary}, annotates {way.known.sum():,} of {len(way.known):,} classes; the others are not "
        f"asked for in its images, and count in no mean"
        + (f"; {len(left_out):,} of its own are ignored" if left_out else "")
    )


def _where(data: DataConfig, number: int) -> str:
    return f"data.sources[{number}]" if data.sources else "data.train"


def _differ(indexes: Sequence[Index]) -> bool:
    return len({index.vocabulary.digest for index in indexes}) > 1


def _refuse_undeclared(indexes: Sequence[Index], said: Sequence[SourceConfig], data: DataConfig) -> None:
    """Sources that label differently without a word on it are more often a slip than meant."""
    mapped = any(source.map is not None for source in said)
    if data.merge or data.by_name or mapped or all(source.vocabulary is not None for source in said):
        return
    first = indexes[0]
    other = next(index for index in indexes if index.vocabulary.digest != first.vocabulary.digest)
    raise UserError(
        f"the sources label differently: {first.source} has vocabulary {first.vocabulary.name!r} "
        f"({len(first.vocabulary)} classes), {other.source} {other.vocabulary.name!r} "
        f"({len(other.vocabulary)} classes)",
        where="data.sources",
        remedy="Say which classes are one: data.merge=[common] (or a table of your own), data.by_name=true, or a map; "
        "or that none is, by naming the `vocabulary` of each source; or pack all with one (--vocabulary FILE).",
    )


def _tables(data: DataConfig) -> list[MergeTable]:
    return [MergeTable.load(table) for table in data.merge]
