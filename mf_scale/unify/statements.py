"""Statements: what tables, maps and equal names declare to be one class, over the classes of all vocabularies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mf_scale.errors import UserError
from mf_scale.unify.tables import MergeTable, Row
from mf_scale.unify.words import listed, nearest, quoted
from mf_scale.vocabulary import ClassInfo, Vocabulary

Member = tuple[str, str]
"""A class of a vocabulary: (vocabulary name, class name)."""


@dataclass(frozen=True)
class Source:
    """One training source: its vocabulary, and what is said of it."""

    vocabulary: Vocabulary
    where: str = ""
    """What messages call it: `data.sources[0]`."""
    map: Mapping[str, str | None] = field(default_factory=dict)
    """Class -> unified name, before any table; None leaves the class out: its pixels are ignored."""


@dataclass(frozen=True)
class Statement:
    """These classes are one class, named so."""

    name: str
    members: tuple[Member, ...]
    origin: str
    """Who says it."""
    thing: bool | None = None
    as_stuff: bool = False
    by_map: bool = False


def vocabularies_of(sources: Sequence[Source]) -> dict[str, Vocabulary]:
    """The distinct vocabularies by name, in order; UserError where two differ under one name."""
    found: dict[str, Vocabulary] = {}
    for source in sources:
        own = source.vocabulary
        if found.setdefault(own.name, own).digest != own.digest:
            raise UserError(
                f"two different vocabularies are both named {own.name!r} ({len(found[own.name])} and {len(own)} "
                f"classes, or other ones)",
                where=source.where,
                remedy="A merge table speaks of vocabularies by name: give one of the files another name, pack again.",
            )
    return found


def kept_members(sources: Sequence[Source]) -> dict[Member, ClassInfo]:
    """Every class that some source keeps, in order of the sources and their labels."""
    return {
        (source.vocabulary.name, info.name): info
        for source in sources
        for info in source.vocabulary.classes
        if source.map.get(info.name, info.name) is not None
    }


def map_statements(sources: Sequence[Source]) -> list[Statement]:
    """One of each vocabulary and unified name that maps name; UserError for unknown classes and maps that differ."""
    targets: dict[Member, dict[str | None, str]] = defaultdict(dict)
    """Target -> the first source that says so; its own key where a source of the vocabulary says nothing."""
    for source in sources:
        _refuse_unknown(source)
        for info in source.vocabulary.classes:
            target = source.map.get(info.name, "")
            if target is not None:
                targets[source.vocabulary.name, info.name].setdefault(target, source.where)
    groups: dict[tuple[str, str], list[Member]] = defaultdict(list)
    for member, said in targets.items():
        if len(said) > 1:
            raise UserError(
                f"sources map {quoted(*member)} differently: "
                + " and ".join(f"{where} {f'to {t!r}' if t else 'not at all'}" for t, where in said.items()),
                where="data.sources",
                remedy="One class of a vocabulary is one unified class: give all sources of it the same map.",
            )
        (target,) = said
        if target:
            groups[member[0], target].append(member)
    return [
        Statement(name, tuple(members), f"the map of {vocabulary}", by_map=True)
        for (vocabulary, name), members in groups.items()
    ]


def table_statements(
    tables: Iterable[MergeTable], vocabularies: Mapping[str, Vocabulary], free: Mapping[Member, ClassInfo]
) -> list[Statement]:
    """One of every row that names a `free` class, one that is kept and that no map speaks of.

    UserError for classes that a vocabulary does not have, and for vocabularies that no source has.
    """
    statements = []
    for table in tables:
        _refuse_foreign(table, vocabularies)
        unknown = []
        names = {vocabulary: set(vocabularies[vocabulary].names) for vocabulary in vocabularies}
        for row in table.rows:
            members = [(v, c) for v in row.members if v in vocabularies for c in row.members[v]]
            unknown += [(v, c) for v, c in members if c not in names[v]]
            if kept := tuple(member for member in members if member in free):
                statements.append(_statement(row, kept, table))
        if unknown:
            vocabulary, name = unknown[0]
            raise UserError(
                f"merge table {table.name!r} names classes that are not there: "
                f"{listed([quoted(*member) for member in unknown])}",
                where=table.where,
                remedy=f"{nearest(name, names[vocabulary])}Write the names as the vocabulary file has them.",
            )
    return statements


def name_statements(free: Iterable[Member], said: Iterable[str]) -> list[Statement]:
    """One of every name that several `free` classes have, or one of them and the unified names `said` already."""
    alike: dict[str, list[Member]] = defaultdict(list)
    for member in free:
        alike[member[1]].append(member)
    names = set(said)
    return [
        Statement(name, tuple(members), "equal names")
        for name, members in alike.items()
        if len(members) > 1 or name in names
    ]


def _statement(row: Row, members: tuple[Member, ...], table: MergeTable) -> Statement:
    return Statement(row.name, members, f"merge table {table.name!r}", row.thing, row.as_stuff)


def _refuse_unknown(source: Source) -> None:
    known = set(source.vocabulary.names)
    unknown = [name for name in source.map if name not in known]
    if unknown:
        raise UserError(
            f"the map names classes that {source.vocabulary.name!r} does not have: "
            f"{listed([repr(name) for name in unknown])}",
            where=source.where,
            remedy=f"{nearest(unknown[0], known)}A map goes from names of the source's classes to unified names.",
        )


def _refuse_foreign(table: MergeTable, vocabularies: Mapping[str, Vocabulary]) -> None:
    named = {vocabulary for row in table.rows for vocabulary in row.members}
    if unknown := sorted(named - vocabularies.keys() - table.vocabularies):
        raise UserError(
            f"merge table {table.name!r} speaks of vocabularies that no source has: "
            f"{listed([repr(v) for v in unknown])}",
            where=table.where,
            remedy=f"{nearest(unknown[0], [*vocabularies, *table.vocabularies])}The sources have "
            f"{listed(list(vocabularies))}. Correct the name, or list it under "
            f'"vocabularies", for those that a run may do without.',
        )
    if named and not named & vocabularies.keys():
        raise UserError(
            f"merge table {table.name!r} speaks of none of the sources' vocabularies: {listed(sorted(named))}",
            where=table.where,
            remedy=f"The sources have {listed(list(vocabularies))}. Take the table out of data.merge, or another one.",
        )
