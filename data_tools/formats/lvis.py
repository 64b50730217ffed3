"""LVIS v1 and v0.5: instances of a long-tailed vocabulary on COCO's images, of which only some classes were looked for.

SRC/[annotations/]lvis_v1_{split}.json (or lvis_v0.5_, or lvis_{split}.json), SRC/train2017/*.jpg, SRC/val2017/*.jpg

An image lies where its `coco_url` says (those of v1's val split in both folders). `neg_category_ids` and
`not_exhaustive_category_ids` are stored with the sample as labels. Otherwise as COCO instances.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_tools.formats.coco_instances import annotate
from data_tools.formats.coco_lists import Json, load_list, shape_records
from data_tools.formats.names import MALFORMED
from data_tools.formats.shapes import need_pycocotools
from data_tools.problems import Problems
from data_tools.record import FormatSource, fingerprint
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

VOCABULARY_V1 = "lvis_v1_1203.json"
VOCABULARY_V05 = "lvis_v0.5_1230.json"
FIELDS = {"negative": "neg_category_ids", "not_exhaustive": "not_exhaustive_category_ids"}
"""Name in a sample: name in the list."""


def open_version(version: str, folder: Path, split: str, vocabulary: Vocabulary) -> FormatSource:
    """Read and check the lists of a split; UserError naming everything that does not fit."""
    listing = _find_listing(folder, version, split)
    need_pycocotools("LVIS")
    try:
        records, notes = shape_records(
            [load_list(listing)], folder, place, vocabulary, federated=partial(federated, vocabulary)
        )
    except MALFORMED as error:
        raise UserError(
            f"the annotation file is not LVIS: {type(error).__name__} {error}", where=str(listing)
        ) from error
    return FormatSource(vocabulary, records, annotate, fingerprint([listing]), "instance", notes=notes)


open_v1: Callable[[Path, str, Vocabulary], FormatSource] = partial(open_version, "v1")
open_v05: Callable[[Path, str, Vocabulary], FormatSource] = partial(open_version, "v0.5")


def place(entry: Json) -> str:
    """FOLDER/FILE of an image: the end of its url."""
    return "/".join(str(entry["coco_url"]).split("/")[-2:])


def federated(vocabulary: Vocabulary, entry: Json, problems: Problems) -> dict[str, list[int]]:
    """Labels that were looked for and not found, and those of which not every instance is marked."""
    labels = vocabulary.index_of_source_id()
    said = {name: [int(number) for number in entry[field]] for name, field in FIELDS.items()}
    if not labels.keys() >= {number for numbers in said.values() for number in numbers}:
        problems.add(f"images whose federated categories are not in vocabulary {vocabulary.name}", str(entry["id"]))
    return {name: sorted(labels[number] for number in set(numbers) & labels.keys()) for name, numbers in said.items()}


def _find_listing(folder: Path, version: str, split: str) -> Path:
    names = (f"lvis_{version}_{split}.json", f"lvis_{split}.json")
    for path in (parent / name for parent in (folder / "annotations", folder) for name in names):
        if path.exists():
            return path
    raise UserError(
        "a part of the source is missing",
        where=str(folder / names[0]),
        remedy=f"LVIS {version} needs {names[0]} (here or in annotations/), train2017/ and val2017/.",
    )
