"""Lists in COCO's form, shared by its relatives: `images`, `categories`, `annotations` with a shape each.

Read once; each image becomes a record that carries its shapes, drawn in the packing processes. What does not fit is
told at once, with counts. An image without annotations is a sample without segments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from data_tools.encode import MAX_PIXELS
from data_tools.formats.names import file_names, sample_key
from data_tools.formats.shapes import FEW_POINTS, Runs, compact_polygons, runs_of, short_polygons
from data_tools.problems import Problems
from data_tools.record import BadRecord, Record, RecordSegment
from mf_scale.data.decode import IMAGE_FORMATS, UNREADABLE
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

Json = dict[str, Any]
REMEDY = "Repair these entries or take them out; nothing was packed."
ORIGIN = ("id", "coco_url", "flickr_url", "license")
KEPT = ("id", "image_id", "category_id", "iscrowd")
"""What is read of an annotation beside its shape."""
EMPTY = "images without annotations, kept as samples without segments"
NO_PIXEL = "shapes without a pixel, left out"


@dataclass(frozen=True)
class Shapes:
    """The annotations of an image, not yet drawn."""

    size: tuple[int, int]
    shapes: list[tuple[RecordSegment, Any]]
    """Each segment with its polygons or run lengths."""
    federated: dict[str, list[int]] | None = None


def load_list(path: Path) -> Json:
    """A list with polygons as compact arrays; ValueError where it is not one."""
    data = json.loads(path.read_text(encoding="utf-8"), object_hook=_compact)
    for part in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(part), list):
            raise ValueError(f"it has no list of {part}")
    return data


def _compact(entry: Json) -> Json:
    if "segmentation" not in entry:
        return entry
    kept = {name: entry[name] for name in KEPT if name in entry}
    kept["segmentation"] = compact_polygons(entry["segmentation"])
    return kept


def check_parts(paths: Iterable[Path], remedy: str) -> None:
    """UserError naming the first file or folder that is not there."""
    for path in paths:
        if not path.exists():
            raise UserError("a part of the source is missing", where=str(path), remedy=remedy)


def check_categories(data: Json, vocabulary: Vocabulary, problems: Problems) -> None:
    """A category of the list has the name that its id has in the vocabulary: other ids would be other classes."""
    names = {c.source_id: c.name for c in vocabulary.classes}
    for category in data["categories"]:
        said, known = str(category["name"]), names.get(int(category["id"]))
        if known is not None and said != known:
            problems.add(
                f"categories whose id is another class in vocabulary {vocabulary.name}",
                f"{category['id']} is {said}, not {known}",
            )


def shape_records(
    lists: list[Json],
    root: Path,
    place: Callable[[Json], str],
    vocabulary: Vocabulary,
    *,
    left_out: frozenset[int] = frozenset(),
    federated: Callable[[Json, Problems], dict[str, list[int]]] | None = None,
) -> tuple[list[Record], dict[str, int]]:
    """Records of all images of the lists, and notes. `place` tells an entry's FOLDER/FILE below `root`.

    `left_out` are categories that are no class. Raises UserError with everything that does not fit.
    """
    problems = Problems()
    entries = entries_by_id(lists, problems)
    shapes = _shapes(lists, entries, vocabulary, left_out, problems)
    finder, records = _Finder(root, problems), {}
    for image_id, entry in entries.items():
        name = place(entry)
        key = sample_key(PurePosixPath(name).stem)
        if key in records:
            problems.add("images listed twice, or whose names give the same key", name)
        size = listed_size(entry, name, problems)
        origin = {k: entry[k] for k in ORIGIN if k in entry}
        said = federated(entry, problems) if federated else None
        records[key] = Record(key, finder.find(name), origin, Shapes(size, shapes[image_id], said))
    problems.refuse(f"{len(problems)} things are wrong in the annotations", where=str(root), remedy=REMEDY)
    empty = sum(not found for found in shapes.values())
    return list(records.values()), {EMPTY: empty} if empty else {}


def runs_in(record: Record) -> tuple[list[tuple[RecordSegment, Runs]], dict[str, int]]:
    """Each segment with its run lengths, and notes; those without a pixel are left out. Raises BadRecord."""
    shapes: Shapes = record.payload
    _check_image(record.image, shapes.size)  # before anything takes memory by a size that the list only claims
    runs = [(segment, runs_of(shape, shapes.size)) for segment, shape in shapes.shapes]
    filled = [pair for pair in runs if pair[1].area]
    few = sum(short_polygons(shape) for _, shape in shapes.shapes)
    notes = {NO_PIXEL: len(runs) - len(filled), f"{FEW_POINTS}, left out": few}
    return filled, {kind: count for kind, count in notes.items() if count}


def _check_image(path: Path, size: tuple[int, int]) -> None:
    """BadRecord where an image's header says another height and width, or nothing."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            found = image.height, image.width
    except Image.DecompressionBombError:
        return  # Pillow's limit is below ours; the packer decides
    except UNREADABLE as error:
        raise BadRecord(f"images that do not decode ({type(error).__name__})") from error
    if found != size:
        raise BadRecord("images that have another size than their entry")


def entries_by_id(lists: list[Json], problems: Problems) -> dict[int, Json]:
    """Image entries by id; several lists may tell of the same images, one list may not."""
    entries: dict[int, Json] = {}
    for data in lists:
        here = {int(entry["id"]): entry for entry in data["images"]}
        if len(here) < len(data["images"]):
            problems.add("image ids that stand twice", f"{len(data['images']) - len(here)} of {len(data['images'])}")
        entries.update(here)
    return entries


def _shapes(
    lists: list[Json],
    entries: Mapping[int, Json],
    vocabulary: Vocabulary,
    left_out: frozenset[int],
    problems: Problems,
) -> dict[int, list[tuple[RecordSegment, Any]]]:
    """Segments and shapes by image id."""
    labels = vocabulary.index_of_source_id()
    shapes: dict[int, list[tuple[RecordSegment, Any]]] = {image_id: [] for image_id in entries}
    for data in lists:
        check_categories(data, vocabulary, problems)
        seen: set[int] = set()
        for annotation in data["annotations"]:
            number, image_id = int(annotation["id"]), int(annotation["image_id"])
            category = int(annotation["category_id"])
            if number in seen:
                problems.add("annotation ids that stand twice", str(number))
            seen.add(number)
            if image_id not in entries:
                problems.add("annotations without an image entry", str(number))
            elif category in labels:
                label = labels[category]
                crowd = bool(annotation.get("iscrowd", 0))
                segment = RecordSegment(label, 0, vocabulary.classes[label].thing, crowd, number)
                shapes[image_id].append((segment, annotation["segmentation"]))
            elif category not in left_out:
                problems.add(f"category {category}, not in vocabulary {vocabulary.name}", str(number))
    return shapes


def listed_size(entry: Json, name: str, problems: Problems) -> tuple[int, int]:
    """Height and width of an image entry."""
    height, width = int(entry["height"]), int(entry["width"])
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        problems.add("images that are empty or too large by their entry", f"{name} {width}x{height}")
    return height, width


class _Finder:
    """Finds files one folder below a root, by what the folders hold: a name never leads elsewhere."""

    def __init__(self, root: Path, problems: Problems) -> None:
        self.root, self.problems = root, problems
        self.folders = {path.name for path in root.iterdir() if path.is_dir()}
        self.files: dict[str, set[str]] = {}

    def find(self, name: str) -> Path:
        """Path of FOLDER/FILE; what is not there becomes a problem."""
        folder, _, file = name.partition("/")
        if folder in self.folders and folder not in self.files:
            self.files[folder] = file_names(self.root / folder)
        if file not in self.files.get(folder, ()):
            self.problems.add(f"missing images in {self.root / folder}", file)
        return self.root / folder / file
