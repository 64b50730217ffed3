"""Names of the unified classes: said, or their own; renamed where a table says so."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from mf_scale.errors import UserError
from mf_scale.unify.groups import Group
from mf_scale.unify.tables import MergeTable
from mf_scale.unify.words import listed, nearest, quoted


def name_groups(groups: Sequence[Group], tables: Sequence[MergeTable]) -> list[str]:
    """A name for every group, each once.

    A class that nothing speaks of is called as in its vocabulary, with the vocabulary behind it where another unified
    class has that name. Of several names that tables give one class, the shortest counts (`rename` settles it).
    Raises UserError for names that two classes would have, and for renames that go in circles or name nothing.
    """
    said = {statement.name for group in groups for statement in group.statements}
    _refuse_taken(groups, said)
    own = Counter(group.members[0][1] for group in groups if not group.statements)
    before = [{statement.name for statement in group.statements} or {_own_name(group, own, said)} for group in groups]
    rename = _renames(tables)
    _refuse_unknown(rename, {name for names in before for name in names}, tables)
    names = [min((_follow(name, rename) for name in known), key=lambda n: (len(n), n)) for known in before]
    _refuse_shared(names, groups)
    return names


def _own_name(group: Group, own: Mapping[str, int], said: set[str]) -> str:
    ((vocabulary, name),) = group.members
    return name if own[name] == 1 and name not in said else f"{name} ({vocabulary})"


def _refuse_taken(groups: Sequence[Group], said: set[str]) -> None:
    """UserError where a map gives a name that another class has of itself: nothing says whether they are one."""
    by_maps = said - {s.name for group in groups for s in group.statements if not s.by_map}
    for group in groups:
        ((vocabulary, name), *others) = group.members
        if others or group.statements or name not in by_maps:
            continue
        statements = [s for g in groups for s in g.statements if s.name == name]
        raise UserError(
            f"sources map different classes to {name!r}: {statements[0].origin} "
            f"{listed([quoted(*member) for s in statements for member in s.members])}, and {quoted(vocabulary, name)} "
            f"has that name of itself",
            where="data.sources",
            remedy=f"If they are one class, say so: map {name!r} of {vocabulary} to {name!r} as well, or write a "
            f"row in a merge table. If not, map to another name.",
        )


def _renames(tables: Sequence[MergeTable]) -> dict[str, str]:
    found: dict[str, str] = {}
    for table in tables:
        for old, new in table.rename.items():
            if found.setdefault(old, new) != new:
                raise UserError(
                    f"merge tables rename {old!r} to {found[old]!r} and to {new!r}",
                    where=table.where,
                    remedy="A unified class has one name: take one of the two out.",
                )
    for start in found:
        way = [start]
        while way[-1] in found:
            new = found[way[-1]]
            if new in way:
                raise UserError(
                    "merge tables rename in a circle: " + " -> ".join(map(repr, [*way[way.index(new) :], new])),
                    where=listed([table.where or table.name for table in tables if table.rename]),
                    remedy="Take one of these renames out.",
                )
            way.append(new)
    return found


def _follow(name: str, rename: Mapping[str, str]) -> str:
    while name in rename:
        name = rename[name]
    return name


def _refuse_unknown(rename: Mapping[str, str], names: set[str], tables: Sequence[MergeTable]) -> None:
    elsewhere = {row.name for table in tables for row in table.rows}
    """Rows of which a run needs no class are known, and not there."""
    known = names | elsewhere | set(rename.values())
    for old in rename:
        if old not in known:
            raise UserError(
                f"a merge table renames {old!r}, and no unified class has that name",
                where=listed([table.where or table.name for table in tables if old in table.rename]),
                remedy=f"{nearest(old, names | elsewhere)}`rename` goes from a name that a unified class would have to "
                "the one it gets.",
            )


def _refuse_shared(names: Sequence[str], groups: Sequence[Group]) -> None:
    holders: dict[str, list[Group]] = defaultdict(list)
    for name, group in zip(names, groups, strict=True):
        holders[name].append(group)
    for name, those in holders.items():
        if len(those) > 1:
            raise UserError(
                f"two unified classes would be named {name!r}: "
                + " and ".join(listed([quoted(*member) for member in group.members], 3) for group in those[:2]),
                remedy="If they are one class, list their members in one row of a table; else rename one of them.",
            )
