"""Vocabulary: ordered classes with their names, thing/stuff, ids in the source and frequency band."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mf_scale.errors import UserError

BANDS = ("rare", "common", "frequent")
"""Of how often a class is seen."""


@dataclass(frozen=True)
class ClassInfo:
    """One class of a vocabulary."""

    name: str
    thing: bool
    """True for a thing (countable: one segment an instance), False for stuff."""
    source_id: int
    """The id the class has in the annotation files it was packed from."""
    frequency: str | None = None
    """Band in a long-tailed vocabulary: rare, common or frequent."""
    images: int | None = field(default=None, compare=False)
    """Training images that hold it, summed over the sources: what a checkpoint knows of the prior. None: unknown."""


@dataclass(frozen=True)
class Vocabulary:
    """Ordered classes; a label is an index into it, the index after the last is no-object."""

    name: str
    classes: tuple[ClassInfo, ...]
    members: tuple[tuple[tuple[str, str], ...], ...] = field(default=(), compare=False)
    """[K] of (vocabulary, class) that each class was made of, where it was unified from several; else none."""
    made_of: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    """Name and digest of the vocabularies of `members`; none also where they were not kept yet."""

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def names(self) -> list[str]:
        return [c.name for c in self.classes]

    @property
    def things(self) -> list[bool]:
        return [c.thing for c in self.classes]

    @property
    def digest(self) -> str:
        """sha256 over names and kinds in order: two sources with one digest label alike."""
        text = json.dumps([[c.name, c.thing] for c in self.classes], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def images(self) -> list[int] | None:
        """Training images of each class; None where one is not known."""
        counts = [c.images for c in self.classes if c.images is not None]
        return counts if len(counts) == len(self.classes) else None

    def with_images(self, images: Iterable[int]) -> Vocabulary:
        """The same with `images` [K] of training; ValueError for another number of them."""
        pairs = zip(self.classes, images, strict=True)
        return replace(self, classes=tuple(replace(c, images=int(count)) for c, count in pairs))

    def index_of_source_id(self) -> dict[int, int]:
        """Source id -> label."""
        return {c.source_id: i for i, c in enumerate(self.classes)}

    def to_dict(self) -> dict[str, Any]:
        """JSON's form; a count that is not known is left out."""
        classes = [asdict(c) for c in self.classes]
        told: dict[str, Any] = {
            "name": self.name,
            "classes": [{k: v for k, v in c.items() if k != "images" or v is not None} for c in classes],
        }
        if self.members:
            told["members"] = [[list(member) for member in own] for own in self.members]
        if self.made_of:
            told["made_of"] = dict(self.made_of)
        return told

    @staticmethod
    def from_dict(data: Mapping[str, Any], *, where: str = "") -> Vocabulary:
        """Build from `to_dict`'s form; raises UserError for missing fields or names that stand twice."""
        try:
            classes = tuple(
                ClassInfo(
                    _text(c["name"]),
                    _thing(c["thing"]),
                    int(c["source_id"]),
                    _band(c.get("frequency")),
                    _images(c.get("images")),
                )
                for c in data["classes"]
            )
            made_of = tuple((_text(own), _text(digest)) for own, digest in data.get("made_of", {}).items())
            vocabulary = Vocabulary(_text(data["name"]), classes, _members(data.get("members"), len(classes)), made_of)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"the vocabulary cannot be read: {type(error).__name__} {error}",
                where=where,
                remedy="It needs a name and a list of classes, each with name, thing, source_id and maybe frequency.",
            ) from error
        _refuse_doubles(vocabulary, where)
        return vocabulary

    @staticmethod
    def load(path: str | Path) -> Vocabulary:
        """Read a vocabulary file (JSON); raises UserError where it is missing or malformed."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError("the vocabulary file does not exist", where=str(path), remedy="Check the path.") from error
        except OSError as error:
            raise UserError(f"the vocabulary file cannot be read: {error.strerror}", where=str(path)) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"the vocabulary file is not JSON: {error}", where=str(path)) from error
        return Vocabulary.from_dict(data, where=str(path))


def log_prior(images: Sequence[int]) -> list[float]:
    """log(n K / sum of n) of each class: its share of the images against an even one; exactly 0 where all are equal.

    A class without an image counts as one with a single image: its share is small, and its logarithm finite.
    """
    counts = [max(1, count) for count in images]
    total = sum(counts)
    return [math.log(count * len(counts) / total) for count in counts]


def _images(said: Any) -> int | None:
    """Number of images; ValueError for what is none."""
    if said is None:
        return None
    if isinstance(said, bool) or not isinstance(said, int) or said < 0:
        raise ValueError(f"images {said!r} is not a number of images")
    return said


def _members(said: Any, classes: int) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Of each class; ValueError where they are not of as many classes."""
    if said is None:
        return ()
    members = tuple(tuple((_text(vocabulary), _text(name)) for vocabulary, name in own) for own in said)
    if len(members) != classes:
        raise ValueError(f"members of {len(members)} classes")
    return members


def _text(said: Any) -> str:
    """A name; ValueError for half a character, which JSON can say and no file can hold."""
    if not isinstance(said, str):
        raise ValueError(f"name {said!r} is no text")
    said.encode()
    return said


def _thing(said: Any) -> bool:
    """True, false, or 1 and 0; ValueError for anything else: a text would always be true."""
    if said in (True, False):
        return bool(said)
    raise ValueError(f"thing {said!r} is neither true nor false")


def _band(said: Any) -> str | None:
    """Band of frequency, in full or by LVIS's letter; ValueError for anything else."""
    bands = {letter: band for band in BANDS for letter in (band, band[0])}
    if said is None:
        return None
    if not isinstance(said, str) or said not in bands:
        raise ValueError(f"frequency {said!r} is none of {', '.join(BANDS)}")
    return bands[said]


def _refuse_doubles(vocabulary: Vocabulary, where: str) -> None:
    for what, values in (("name", vocabulary.names), ("source id", [c.source_id for c in vocabulary.classes])):
        doubles = _doubles(values)
        if doubles:
            raise UserError(
                f"vocabulary {vocabulary.name!r} has the same {what} for several classes: {doubles[:5]}",
                where=where,
                remedy="Every class needs a name and a source id of its own.",
            )


def _doubles(values: Sequence[Any] | Iterable[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [v for v in values if v in seen or seen.add(v)]  # type: ignore[func-returns-value]
