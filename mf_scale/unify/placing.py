"""Placing: a source that the unified vocabulary was not made of, for example to evaluate on, mapped into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mf_scale.errors import UserError
from mf_scale.unify.groups import Union
from mf_scale.unify.merge import LEFT_OUT, UnifiedSource, way_by
from mf_scale.unify.statements import Member, Source
from mf_scale.unify.tables import MergeTable
from mf_scale.unify.words import listed, nearest, quoted
from mf_scale.vocabulary import Vocabulary


def place(
    vocabulary: Vocabulary, source: Source, tables: Sequence[MergeTable] = (), *, by_name: bool = False
) -> UnifiedSource:
    """The way of `source` into a vocabulary that stays as it is; what goes nowhere in it is left out.

    In this order counts what says something of a class: the source's map, what the vocabulary was made of, the tables,
    and equal names where they are trusted. Raises UserError for a map to a class that is not there, a class that the
    tables lead to two classes, a thing that would be stuff, a source of which nothing is left, and one whose vocabulary
    is not the one of its name that the run was made of.
    """
    own, names = source.vocabulary, {name: label for label, name in enumerate(vocabulary.names)}
    _refuse_unknown(source, names)
    known = _members(vocabulary)
    _refuse_namesake(vocabulary, source, known)
    label_of = {own_name: names[target] for own_name, target in source.map.items() if target is not None}
    free = [name for name in own.names if name not in source.map]
    label_of |= {name: known[own.name, name] for name in free if (own.name, name) in known}
    if all(said != own.name for said, _ in known):  # else what is not among the members was left out on purpose
        label_of |= _by_tables([name for name in free if name not in label_of], own.name, known, names, tables)
        if by_name:
            alike = _by_name(known, names)
            label_of |= {name: alike[name] for name in free if name not in label_of and name in alike}
    if not label_of:
        raise UserError(
            f"no class of {own.name!r} is one of {vocabulary.name!r}",
            where=source.where,
            remedy="Say which are, by `map` or a merge table, or trust equal names with data.by_name=true.",
        )
    labels = np.array([label_of.get(name, LEFT_OUT) for name in own.names], np.int64)
    _refuse_kinds(vocabulary, source, labels)
    return way_by(source, labels, np.array(vocabulary.things, bool))


def same_classes(vocabulary: Vocabulary) -> bool:
    """Whether it is some dataset's own, and not one that was unified."""
    return not vocabulary.members


def _members(vocabulary: Vocabulary) -> dict[Member, int]:
    if same_classes(vocabulary):
        return {(vocabulary.name, name): label for label, name in enumerate(vocabulary.names)}
    return {member: label for label, own in enumerate(vocabulary.members) for member in own}


def _by_tables(
    free: Sequence[str], own: str, known: dict[Member, int], names: dict[str, int], tables: Sequence[MergeTable]
) -> dict[str, int]:
    """Labels of the free classes that the rows of all tables together join with a unified class."""
    union = Union()
    for old, new in (pair for table in tables for pair in table.rename.items()):
        union.join([("unified name", old, None), ("unified name", new, None)])
    for row in (row for table in tables for row in table.rows):
        members = [(vocabulary, name) for vocabulary, classes in row.members.items() for name in classes]
        union.join([("unified name", row.name, None), *members])
    reached: dict[object, set[int]] = defaultdict(set)
    for member, label in known.items():
        reached[union.root(member)].add(label)
    found = dict[str, int]()
    for name in free:
        root = union.root((own, name))
        labels = reached.get(root) or {
            label for unified, label in names.items() if union.root(("unified name", unified, None)) == root
        }
        if len(labels) > 1:
            of = {label: unified for unified, label in names.items()}
            raise UserError(
                f"the merge tables make {quoted(own, name)} several classes: {listed([repr(of[k]) for k in labels])}",
                where=", ".join(table.where for table in tables),
                remedy="Say which one by the `map` of the source, or null to leave it out.",
            )
        found |= dict.fromkeys([name], *labels) if labels else {}
    return found


def _by_name(known: dict[Member, int], names: dict[str, int]) -> dict[str, int]:
    """Labels by name: of a unified class, or of a class that one was made of where no other has that name."""
    alike: dict[str, set[int]] = defaultdict(set)
    for (_, name), label in known.items():
        alike[name].add(label)
    return {name: next(iter(labels)) for name, labels in alike.items() if len(labels) == 1} | names


def _refuse_unknown(source: Source, names: dict[str, int]) -> None:
    own = set(source.vocabulary.names)
    for name in source.map:
        if name not in own:
            raise UserError(
                f"the map names a class that {source.vocabulary.name!r} does not have: {name!r}",
                where=source.where,
                remedy=f"{nearest(name, own)}A map goes from names of the source's classes to unified names.",
            )
    for target in source.map.values():
        if target is not None and target not in names:
            raise UserError(
                f"the map leads to {target!r}, and the run has no such class",
                where=source.where,
                remedy=f"{nearest(target, names)}What the run does not know is left out: map it to null.",
            )


def _refuse_namesake(vocabulary: Vocabulary, source: Source, known: dict[Member, int]) -> None:
    """Another vocabulary of a name that the run knows: its new classes would be left out, as if that had been said."""
    own = source.vocabulary
    members = {name for of, name in known if of == own.name}
    digests = {vocabulary.name: vocabulary.digest} if same_classes(vocabulary) else dict(vocabulary.made_of)
    if not members or digests.get(own.name) == own.digest:
        return
    gone = sorted(members - set(own.names))
    said = () if own.name in digests else source.map
    new = [name for name in own.names if name not in members and name not in said]
    if own.name not in digests and not gone and not new:
        return  # of the time before digests were kept; its members tell no more
    told = [f"the source has no {listed([repr(name) for name in gone])}"] if gone else []
    told += [f"no class of the run was made of {listed([repr(name) for name in new])}"] if new else []
    leave_out = ", or map to null what training left out" if own.name not in digests and not gone else ""
    raise UserError(
        f"the source and the run have two different vocabularies named {own.name!r}: "
        + ("; ".join(told) or "order or kinds of their classes differ"),
        where=source.where,
        remedy="Pack it again with the vocabulary that was trained on, or with one of another name whose classes data."
        f"merge, data.by_name=true or a map then declare{leave_out} (docs/vocabularies.md).",
    )


def _refuse_kinds(vocabulary: Vocabulary, source: Source, labels: np.ndarray) -> None:
    for info, label in zip(source.vocabulary.classes, labels, strict=True):
        if label != LEFT_OUT and vocabulary.classes[label].thing and not info.thing:
            raise UserError(
                f"{quoted(source.vocabulary.name, info.name)} is stuff, and {vocabulary.names[label]!r} is a thing: it "
                "has no instances to be compared with",
                where=source.where,
                remedy="Leave it out: map it to null.",
            )
