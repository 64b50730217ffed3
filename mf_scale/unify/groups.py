"""Groups: the classes that are one, by all statements together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mf_scale.errors import UserError
from mf_scale.unify.statements import Member, Statement
from mf_scale.unify.words import quoted
from mf_scale.vocabulary import ClassInfo


@dataclass(frozen=True)
class Group:
    """Classes that are one, and who says so."""

    members: tuple[Member, ...]
    statements: tuple[Statement, ...]
    """None for a class that stands for itself."""


class Union:
    """Union-find over anything that can be a key."""

    def __init__(self) -> None:
        self.parent: dict[Hashable, Hashable] = {}

    def root(self, item: Hashable) -> Hashable:
        """The one that stands for all that `item` is joined with."""
        top = item
        while (above := self.parent.setdefault(top, top)) != top:
            top = above
        while self.parent[item] != top:  # the whole way points at the top from now on
            self.parent[item], item = top, self.parent[item]
        return top

    def join(self, items: Iterable[Hashable]) -> None:
        """All of `items` are one."""
        roots = [self.root(item) for item in items]
        for other in roots[1:]:
            self.parent[self.root(other)] = self.root(roots[0])


def group_members(kept: Mapping[Member, ClassInfo], statements: Sequence[Statement]) -> list[Group]:
    """The groups, in the order in which `kept` has their first members.

    UserError where two classes of one vocabulary would become one that no single statement declares to be one, and
    where a map and another map, a table or an equal name, which stand in two places, make different classes one.
    """
    union = Union()
    for statement in statements:  # a name is a node as well: statements of one name speak of one class
        union.join([("unified name", statement.name, None), *statement.members])
    members: dict[Hashable, list[Member]] = defaultdict(list)
    for member in kept:
        members[union.root(member)].append(member)
    said: dict[Hashable, list[Statement]] = defaultdict(list)
    for statement in statements:
        said[union.root(statement.members[0])].append(statement)
    groups = [Group(tuple(own), tuple(said[root])) for root, own in members.items()]
    for group in groups:
        _refuse_undeclared(group)
        _refuse_crossed(group, kept)
    return groups


def _refuse_undeclared(group: Group) -> None:
    declared = Union()
    for statement in group.statements:
        by_vocabulary: dict[str, list[Member]] = defaultdict(list)
        for member in statement.members:
            by_vocabulary[member[0]].append(member)
        for together in by_vocabulary.values():
            declared.join(together)
    first: dict[str, Member] = {}
    for member in group.members:
        other = first.setdefault(member[0], member)
        if declared.root(other) != declared.root(member):
            way = " and ".join(f"{quoted(*one)} is {' and '.join(_names_of(one, group))}" for one in (other, member))
            raise UserError(
                f"two classes of one vocabulary would become one, and nothing declares that they are: {way}",
                where=", ".join(dict.fromkeys(s.origin for s in group.statements)),
                remedy="If that is meant, list both in one row of a table (or map both by the source's map); "
                "else give one of the unified classes another name, or take the class that links them out of a row.",
            )


def _refuse_crossed(group: Group, kept: Mapping[Member, ClassInfo]) -> None:
    """A vocabulary that has a class of the other's name of its own, elsewhere, tells that the two are not one."""
    own = set(group.members)
    said = [(member, statement) for statement in group.statements for member in statement.members]
    for one, first in (pair for pair in said if pair[1].by_map):
        for other, second in said:
            twin = one[0], other[1]
            if one in second.members or one[1] == other[1] or twin in own or twin not in kept:
                continue
            raise UserError(
                f"sources map different classes to one: {quoted(*one)} is {first.name!r} by {first.origin} and "
                f"{quoted(*other)} is {second.name!r} by {second.origin}, but {one[0]} has {other[1]!r} as another "
                "class",
                where="data.sources",
                remedy="Correct the map; or, if the two are one class all the same, take them out of every map and "
                "list them in one row of a merge table.",
            )


def _names_of(member: Member, group: Group) -> list[str]:
    return [f"{s.name!r} by {s.origin}" for s in group.statements if member in s.members]
