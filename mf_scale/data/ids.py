"""What the values of a label map mean: declared once, where a source is packed or indexed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mf_scale.data.batch import IGNORE, NONE
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

UNKNOWN = -3
"""In the table of a meaning: a value that nothing was declared for."""
REMEDY = 'Declare them as {"ignore": [values], "background": [values], "offset": number}, each once.'


@dataclass(frozen=True)
class IdMeaning:
    """A label map's values: `value + offset` is the source id of a class unless the value is listed here."""

    ignore: tuple[int, ...] = ()
    """Outside the loss and the metrics."""
    background: tuple[int, ...] = ()
    """No segment: a negative of every segment."""
    offset: int = 0
    """Added to a value to give a class's source id."""

    def table(self, vocabulary: Vocabulary, values: int) -> np.ndarray:
        """Label, NONE, IGNORE or UNKNOWN of every value below `values`, int32 [values].

        Raises UserError as `meanings` does.
        """
        table = np.full(values, UNKNOWN, np.int32)
        for value, meaning in self.meanings(vocabulary).items():
            if 0 <= value < values:
                table[value] = meaning
        return table

    def meanings(self, vocabulary: Vocabulary) -> dict[int, int]:
        """Label, NONE or IGNORE of every value that has a meaning; as short as the vocabulary, however large a value.

        Raises UserError where a listed value is also a class's.
        """
        meanings = {source_id - self.offset: label for source_id, label in vocabulary.index_of_source_id().items()}
        for what, listed, meaning in (("ignore", self.ignore, IGNORE), ("background", self.background, NONE)):
            for value in listed:
                if value in meanings:
                    label = meanings[value]
                    also = f"class {vocabulary.names[label]!r}" if label >= 0 else "ignore and background"
                    raise UserError(f"the {what} value {value} is also that of {also}", remedy=REMEDY)
                meanings[value] = meaning
        return meanings

    def to_dict(self) -> dict[str, Any]:
        return {"ignore": list(self.ignore), "background": list(self.background), "offset": self.offset}

    @staticmethod
    def from_dict(data: Mapping[str, Any], *, where: str = "") -> IdMeaning:
        """From `to_dict`'s form, every key optional; raises UserError for unknown keys and what is no number."""
        try:
            unknown = sorted(set(data) - {"ignore", "background", "offset"})
            if unknown:
                raise ValueError(f"unknown {unknown}")
            ignore, background = (tuple(map(_whole, _listed(data, name))) for name in ("ignore", "background"))
            if doubles := {value for value in (*ignore, *background) if (*ignore, *background).count(value) > 1}:
                raise ValueError(f"{min(doubles)} is listed twice")
            if negative := [value for value in (*ignore, *background) if value < 0]:
                raise ValueError(f"{negative[0]} is no value of a map")
            return IdMeaning(ignore, background, _whole(data.get("offset", 0)))
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"the meaning of ids cannot be read: {error}", where=where, remedy=REMEDY) from error


def _listed(data: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(listed := data.get(name, []), list | tuple):
        raise ValueError(f"{name} is {listed!r} and not a list of values")
    return list(listed)


def _whole(value: Any) -> int:
    """A number as it was written: "12" is not 1 and 2, nor 255.7 the value 255."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


@dataclass(frozen=True)
class LabelMember:
    """How the samples of shards made elsewhere are labelled: by one grey PNG of values, without a list of segments."""

    suffix: str
    """Of the member, for example `png` or `mask.png`."""
    ids: IdMeaning

    def to_dict(self) -> dict[str, Any]:
        return {"suffix": self.suffix, "ids": self.ids.to_dict()}

    @staticmethod
    def from_dict(data: Mapping[str, Any], *, where: str = "") -> LabelMember:
        return LabelMember(str(data["suffix"]), IdMeaning.from_dict(data["ids"], where=where))
