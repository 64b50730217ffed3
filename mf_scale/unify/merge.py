"""Unify: several vocabularies and what is declared of them -> one vocabulary, and a map of labels for each source.

Equal spelling merges nothing by itself: "screen" is a projection screen here and a monitor there, "bat" an animal or a
club, "crane" a bird or a machine. Classes become one where a merge table or a source's map says so, or where names are
trusted on purpose (`by_name`). Declarations add up over all tables (if A is B, and B is C, then A is C), and a unified
class is known by its name: rows of one name in several tables speak of one class.

A class that a source does not annotate is UNKNOWN there, not negative: nothing can be learnt from its images about it.
Where one source has only a coarse class (COCO panoptic "building-other-merged") that another divides ("skyscraper" and
"building-other" of COCO-Stuff), both ways are sound. Kept apart, the fine classes are unknown in the coarse source, and
the coarse one in the fine source: neither is ever called wrong for what the other would say, and nobody is taught that
a skyscraper is no building. Folded together by a row that lists the fine classes, all images speak of the coarse class
and the finer distinction is given up. A third way, a coarse label as the sum over its parts, is not offered: the class
loss would need it in the cost of matching as well, and the two plain ways can be explained in a sentence each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mf_scale.errors import UserError
from mf_scale.unify.groups import Group, group_members
from mf_scale.unify.names import name_groups
from mf_scale.unify.statements import (
    Member,
    Source,
    kept_members,
    map_statements,
    name_statements,
    table_statements,
    vocabularies_of,
)
from mf_scale.unify.tables import MergeTable
from mf_scale.unify.words import listed, quoted
from mf_scale.vocabulary import ClassInfo, Vocabulary

LEFT_OUT = -1
"""In a source's labels: this class has no unified class, its pixels are ignored."""


@dataclass(frozen=True, eq=False)
class UnifiedSource:
    """What a source's labels are among the unified classes."""

    vocabulary: str
    where: str
    labels: np.ndarray
    """int64 [K_source]: source label -> unified label, or LEFT_OUT."""
    known: np.ndarray
    """bool [K]: the classes that this source annotates: the image of `labels`. All others are unknown there."""
    joined: np.ndarray
    """bool [K]: stuff of which an image of this source may hold several segments, as they were packed as things or as
    several classes: a panoptic target has to join them."""
    left_out: tuple[str, ...]
    """Names of the source's classes that are left out."""


@dataclass(frozen=True, eq=False)
class Unified:
    """The unified vocabulary, and every source's way into it."""

    vocabulary: Vocabulary
    """K classes, in order of the sources and their labels; source ids are the labels."""
    sources: tuple[UnifiedSource, ...]
    members: tuple[tuple[Member, ...], ...]
    """[K] of (vocabulary name, class name), in the order of the sources."""


def unify(
    sources: Sequence[Source], tables: Sequence[MergeTable] = (), *, by_name: bool = False, name: str = "unified"
) -> Unified:
    """One vocabulary for all sources.

    Neither the order of the tables nor that of the sources changes which classes are one, or their names; the sources'
    order gives the order of labels. `by_name` also merges classes of equal names that no table and no map speaks of.
    Raises UserError, one paragraph each, for whatever cannot be meant: see docs/vocabularies.md.
    """
    vocabularies = vocabularies_of(sources)
    kept = kept_members(sources)
    if not kept:
        raise UserError("no class is left in the unified vocabulary", where="data.sources", remedy="Check the maps.")
    for source in sources:
        if not any(
            (source.vocabulary.name, own) in kept and source.map.get(own, own) for own in source.vocabulary.names
        ):
            raise UserError(
                "the map leaves out every class of the source", where=source.where, remedy="Drop the source."
            )
    statements = map_statements(sources)
    mapped = {member for statement in statements for member in statement.members}
    free = {member: info for member, info in kept.items() if member not in mapped}
    statements += table_statements(tables, vocabularies, free)
    if by_name:
        spoken_of = {member for statement in statements for member in statement.members}
        statements += name_statements((m for m in free if m not in spoken_of), [s.name for s in statements])
    groups = group_members(kept, statements)
    names = name_groups(groups, tables)
    things = [_is_thing(named, group, kept) for named, group in zip(names, groups, strict=True)]
    classes = [
        ClassInfo(named, thing, label, _band([kept[member] for member in group.members]))
        for label, (named, thing, group) in enumerate(zip(names, things, groups, strict=True))
    ]
    label_of = {member: label for label, group in enumerate(groups) for member in group.members}
    members = tuple(group.members for group in groups)
    return Unified(
        Vocabulary(name, tuple(classes), members, tuple((own.name, own.digest) for own in vocabularies.values())),
        tuple(_way_of(source, label_of, np.array(things)) for source in sources),
        members,
    )


def _way_of(source: Source, label_of: Mapping[Member, int], things: np.ndarray) -> UnifiedSource:
    own = source.vocabulary
    labels = [
        LEFT_OUT if source.map.get(info.name, info.name) is None else label_of[own.name, info.name]
        for info in own.classes
    ]
    return way_by(source, np.array(labels, np.int64), things)


def way_by(source: Source, labels: np.ndarray, things: np.ndarray) -> UnifiedSource:
    """The way of a source by its labels among the unified classes [K_source]; `things` bool [K]."""
    own = source.vocabulary
    annotated = labels[labels != LEFT_OUT]
    classes = np.bincount(annotated, minlength=len(things))
    packed_as_things = np.bincount(labels[(labels != LEFT_OUT) & np.array(own.things)], minlength=len(things))
    return UnifiedSource(
        own.name,
        source.where,
        labels,
        classes > 0,
        ~things & ((classes > 1) | (packed_as_things > 0)),
        tuple(info.name for info, label in zip(own.classes, labels, strict=True) if label == LEFT_OUT),
    )


def _is_thing(name: str, group: Group, kept: Mapping[Member, ClassInfo]) -> bool:
    """Thing or stuff; UserError where the members differ from each other, or from what a row says."""
    kinds: dict[bool, list[Member]] = defaultdict(list)
    for member in group.members:
        kinds[kept[member].thing].append(member)
    said = {statement.thing: statement.origin for statement in group.statements if statement.thing is not None}
    if len(kinds) > 1 and not any(statement.as_stuff for statement in group.statements):
        raise UserError(
            f"the unified class {name!r} would be a thing and stuff: thing in {_members(kinds[True])}, "
            f"stuff in {_members(kinds[False])}",
            where=_origins(group),
            remedy='Keep them apart, or say `"thing": "if all"` in its row: it is then stuff, instances joined.',
        )
    thing = len(kinds) == 1 and True in kinds
    if said and thing not in said:
        raise UserError(
            f"{next(iter(said.values()))} calls {name!r} {'stuff' if thing else 'a thing'}, and its classes are "
            f"{'things' if thing else 'stuff'}: {_members(group.members)}",
            remedy="Correct `thing` in its row, or leave it out: the classes say it themselves.",
        )
    return thing


def _band(infos: Iterable[ClassInfo]) -> str | None:
    """The band that all have; None where they differ or one has none: their counts would have to be added."""
    bands = {info.frequency for info in infos}
    return bands.pop() if len(bands) == 1 else None


def _members(members: Iterable[Member]) -> str:
    return listed([quoted(*member) for member in members])


def _origins(group: Group) -> str:
    return ", ".join(dict.fromkeys(statement.origin for statement in group.statements))
