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

        Raises UserError where a listed value is also a class's.
        """
        table = np.full(values, UNKNOWN, np.int32)
        for source_id, label in vocabulary.index_of_source_id().items():
            if 0 <= source_id - self.offset < values:
                table[source_id - self.offset] = label
        for what, listed, meaning in (("ignore", self.ignore, IGNORE), ("background", self.background, NONE)):
            for value in (value for value in listed if 0 <= value < values):
                if table[value] != UNKNOWN:
                    label = int(table[value])
                    also = f"class {vocabulary.names[label]!r}" if label >= 0 else "ignore and background"
                    raise UserError(f"the {what} value {value} is also that of {also}", remedy=REMEDY)
                table[value] = meaning
        return table

    def to_dict(self) -> dict[str, Any]:
        return {"ignore": list(self.ignore), "background": list(self.background), "offset": self.offset}

    @staticmethod
    def from_dict(data: Mapping[str, Any], *, where: str = "") -> IdMeaning:
        """From `to_dict`'s form, every key optional; raises UserError for unknown keys and what is no number."""
        try:
            unknown = sorted(set(data) - {"ignore", "background", "offset"})
            if unknown:
                raise ValueError(f"unknown {unknown}")
            ignore, background = (tuple(map(int, data.get(name, ()))) for name in ("ignore", "background"))
            return IdMeaning(ignore, background, int(data.get("offset", 0)))
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the meaning of ids cannot be read: {error}", where=where, remedy=REMEDY) from error


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
