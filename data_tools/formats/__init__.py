"""Dataset formats by name: one file a format, each a function (folder, split, vocabulary) -> FormatSource."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.formats import (
    ade20k_150,
    ade20k_full,
    ade20k_panoptic,
    cityscapes,
    coco_instances,
    coco_panoptic,
    coco_stuff,
    coco_stuff_10k,
    context,
    folder,
    lvis,
    mapillary,
    voc,
)
from data_tools.record import FormatSource


@dataclass(frozen=True)
class Format:
    """A format and the vocabulary it usually comes with."""

    open_source: Callable[[Path, str, Any], FormatSource]
    vocabulary: str | None
    """File in data_tools/vocabularies; None where a source brings its own classes."""


FORMATS = {
    "coco_panoptic": Format(coco_panoptic.open_source, coco_panoptic.VOCABULARY),
    "coco_stuff": Format(coco_stuff.open_source, coco_stuff.VOCABULARY),
    "coco_stuff_10k": Format(coco_stuff_10k.open_source, coco_stuff_10k.VOCABULARY),
    "coco_instances": Format(coco_instances.open_source, coco_instances.VOCABULARY),
    "lvis_v1": Format(lvis.open_v1, lvis.VOCABULARY_V1),
    "lvis_v0.5": Format(lvis.open_v05, lvis.VOCABULARY_V05),
    "ade20k_150": Format(ade20k_150.open_source, ade20k_150.VOCABULARY),
    "ade20k_panoptic": Format(ade20k_panoptic.open_source, ade20k_panoptic.VOCABULARY),
    "ade20k_full": Format(ade20k_full.open_source, ade20k_full.VOCABULARY),
    "cityscapes": Format(cityscapes.open_source, cityscapes.VOCABULARY),
    "cityscapes_semantic": Format(cityscapes.open_semantic, cityscapes.VOCABULARY),
    "mapillary_v1.2": Format(mapillary.open_v12, mapillary.VOCABULARY_V12),
    "mapillary_v2.0": Format(mapillary.open_v20, mapillary.VOCABULARY_V20),
    "voc": Format(voc.open_source, voc.VOCABULARY),
    "voc_semantic": Format(voc.open_semantic, voc.VOCABULARY_SEMANTIC),
    "context_59": Format(context.open_59, context.VOCABULARY_59),
    "context_459": Format(context.open_459, context.VOCABULARY_459),
    "folder": Format(folder.open_source, None),
}
