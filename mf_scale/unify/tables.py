"""Merge tables: which classes of which vocabularies are one class, as people write it down in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mf_scale.errors import UserError
from mf_scale.unify.words import nearest, quoted
from mf_scale.vocabulary import Vocabulary

BUNDLED = Path(__file__).parents[1] / "merges"
"""Folder of the tables that come with the program."""
IF_ALL = "if all"
"""A row's `thing` that lets its members differ: a thing where all of them are things, else stuff."""
FORM = 'A table is {"name": ..., "classes": [{"name": ..., "members": {VOCABULARY: CLASS or [CLASSES]}}, ...]}.'
_TABLE_KEYS = ("name", "about", "vocabularies", "classes", "rename")
_ROW_KEYS = ("name", "thing", "members", "why")


@dataclass(frozen=True)
class Row:
    """One unified class of a table: its members are declared to be one class."""

    name: str
    members: Mapping[str, tuple[str, ...]]
    """Vocabulary name -> its classes."""
    thing: bool | None = None
    """What every member has to be; None: they have to agree."""
    as_stuff: bool = False
    """They may differ; the class is then stuff (`"thing": "if all"`)."""


@dataclass(frozen=True)
class MergeTable:
    """Declared equivalences."""

    name: str
    rows: tuple[Row, ...]
    rename: Mapping[str, str] = field(default_factory=dict)
    """Name of a unified class -> the name it gets."""
    vocabularies: frozenset[str] = frozenset()
    """Vocabularies the table speaks of that a run may do without; any other has to be some source's."""
    where: str = ""
    """Its file."""

    @staticmethod
    def from_dict(data: Any, *, where: str = "") -> MergeTable:
        """Read the form of the file; UserError for what a table cannot say, and for a class that stands in two rows."""
        data = _object(data, _TABLE_KEYS, "the table", where)
        rows = tuple(_row(row, where) for row in _list(data.get("classes", []), '"classes"', where))
        rename = _names(data.get("rename", {}), '"rename"', where)
        known = frozenset(_name(v, '"vocabularies"', where) for v in _list(data.get("vocabularies", []), "it", where))
        table = MergeTable(_name(data.get("name"), "the table", where), rows, rename, known, where)
        _refuse_doubles(table)
        return table

    @staticmethod
    def load(said: str | Path) -> MergeTable:
        """Read a table: a file, or the name of a bundled one; UserError where it is missing or malformed."""
        path = table_path(said)
        return MergeTable.from_dict(read_json(path, "merge table"), where=str(path))


def bundled_tables() -> list[str]:
    """Names of the tables that come with the program."""
    return sorted(path.stem for path in BUNDLED.glob("*.json"))


def table_path(said: str | Path) -> Path:
    """File of a table: `said` is a path, or the name of a bundled table; UserError where there is none."""
    named = BUNDLED / f"{said}.json"
    if str(said) in bundled_tables():
        return named
    if not Path(said).is_file():
        raise UserError(
            f"there is no merge table {str(said)!r}",
            where="data.merge",
            remedy=f"{nearest(str(said), bundled_tables())}Name a file, or one of the bundled tables: "
            f"{', '.join(bundled_tables())}.",
        )
    return Path(said)


def read_map(said: str | Mapping[str, str | None] | None, where: str) -> dict[str, str | None]:
    """A source's map: class -> unified name, or None to leave the class out; inline or the name of a JSON file."""
    if said is None:
        return {}
    data = read_json(Path(said), "map") if isinstance(said, str) else said
    place = said if isinstance(said, str) else where
    if not isinstance(data, Mapping):
        raise UserError("a map is not a mapping", where=place, remedy="It is {CLASS: UNIFIED NAME or null, ...}.")
    return {
        _name(source, "the map", place): None if target is None else _name(target, f"the map of {source!r}", place)
        for source, target in data.items()
    }


def check_source(vocabulary: Vocabulary, said: str | None, where: str) -> None:
    """UserError unless the vocabulary of a source is the one it is said to have: a name, or a vocabulary file."""
    if said is None or said == vocabulary.name:
        return
    if not said.endswith(".json"):
        raise UserError(
            f"the source was packed with vocabulary {vocabulary.name!r}, not {said!r}",
            where=where,
            remedy="Correct `vocabulary`, or name the source that was meant.",
        )
    expected = Vocabulary.load(said)
    if expected.digest != vocabulary.digest:
        raise UserError(
            f"the source was packed with other classes than {said} has: {vocabulary.name!r}, {len(vocabulary)} "
            f"classes, against {expected.name!r}, {len(expected)}",
            where=where,
            remedy="Correct `vocabulary`, or pack the source with that file (--vocabulary FILE).",
        )


def read_json(path: Path, what: str) -> Any:
    """A JSON file; UserError where it is missing, is not JSON, or says one key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in doubles(keys):
            raise UserError(
                f"the {what} says {key!r} twice in one place", where=str(path), remedy="Only the last would count."
            )
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise UserError(f"the {what} cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {what} is not JSON: {error}", where=str(path)) from error


def doubles(values: Iterable[Any]) -> list[Any]:
    """Each value that stands there more than once, in order of its second place."""
    seen: set[Any] = set()
    return list(dict.fromkeys(v for v in values if v in seen or seen.add(v)))  # type: ignore[func-returns-value]


def _row(data: Any, where: str) -> Row:
    data = _object(data, _ROW_KEYS, "a row of the table", where)
    name = _name(data.get("name"), "a row", where)
    said = data.get("members")
    if not isinstance(said, Mapping) or not said:
        raise UserError(f"row {name!r} has no members", where=where, remedy=FORM)
    members = {}
    for vocabulary, classes in said.items():
        listed = classes if isinstance(classes, list) else [classes]
        members[vocabulary] = tuple(_name(c, f"row {name!r}, {vocabulary}", where) for c in listed)
        if not listed:
            raise UserError(f"row {name!r} names no class of {vocabulary}", where=where, remedy=FORM)
    thing = data.get("thing")
    if thing is not None and thing != IF_ALL and not isinstance(thing, bool):
        raise UserError(
            f"row {name!r} says thing = {thing!r}", where=where, remedy=f'It takes true, false or "{IF_ALL}".'
        )
    return Row(name, members, thing if isinstance(thing, bool) else None, thing == IF_ALL)


def _refuse_doubles(table: MergeTable) -> None:
    for name in doubles(row.name for row in table.rows):
        raise UserError(
            f"two rows of merge table {table.name!r} are named {name!r}",
            where=table.where,
            remedy="Make them one row, or give one another name.",
        )
    row_of: dict[tuple[str, str], str] = {}
    for row in table.rows:
        for member in ((vocabulary, name) for vocabulary, names in row.members.items() for name in names):
            other = row_of.setdefault(member, row.name)
            if other != row.name or sum(name == member[1] for name in row.members[member[0]]) > 1:
                place = f"both {other!r} and {row.name!r}" if other != row.name else f"{row.name!r} twice"
                raise UserError(
                    f"merge table {table.name!r} has {quoted(*member)} in {place}",
                    where=table.where,
                    remedy="A class belongs to one row: take it out of the other, or make the two rows one.",
                )


def _object(data: Any, keys: tuple[str, ...], what: str, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise UserError(f"{what} is not an object", where=where, remedy=FORM)
    for key in data.keys() - set(keys):
        raise UserError(f"{what} has an unknown key {key!r}", where=where, remedy=nearest(str(key), keys) + FORM)
    return data


def _list(data: Any, what: str, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise UserError(f"{what} is not a list", where=where, remedy=FORM)
    return data


def _names(data: Any, what: str, where: str) -> dict[str, str]:
    if not isinstance(data, Mapping):
        raise UserError(f"{what} is not an object", where=where, remedy='It is {"OLD NAME": "NEW NAME", ...}.')
    return {_name(old, what, where): _name(new, what, where) for old, new in data.items()}


def _name(said: Any, what: str, where: str) -> str:
    """A name as it stands; UserError for an empty one, no text, or half a character, which no file can hold."""
    if isinstance(said, str) and said.strip() and said.isprintable():
        return said
    raise UserError(f"{what} has {said!r} for a name", where=where, remedy="A name is text of one line.")
