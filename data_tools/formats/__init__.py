"""Dataset formats by name: one file a format, each a function (folder, split, vocabulary) -> FormatSource."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.formats import coco_panoptic, coco_stuff
from data_tools.record import FormatSource
from mf_scale.vocabulary import Vocabulary


@dataclass(frozen=True)
class Format:
    """A format and the vocabulary it usually comes with."""

    open_source: Callable[[Path, str, Vocabulary], FormatSource]
    vocabulary: str
    """File in data_tools/vocabularies."""


FORMATS = {
    "coco_panoptic": Format(coco_panoptic.open_source, coco_panoptic.VOCABULARY),
    "coco_stuff": Format(coco_stuff.open_source, coco_stuff.VOCABULARY),
}
