"""Make the sample that is embedded in this repository: `python -m data_tools.make_sample SRC DST`.

SRC holds folders in COCO's own layout: `coco_panoptic` (annotations/panoptic_{split}.json and PNG) and `coco_stuff`
(annotations/instances_{split}.json and stuff_{split}.json), each with the images of train2017 and val2017. Of these
the images whose licence allows a changed copy to be passed on (4 CC BY, 5 CC BY-SA, 7 no known restrictions) are
taken, their shorter side reduced to 320, re-encoded as JPEG, with the annotation in the same formats at the new size.
Sorted by image id, every fourth image goes to val until it has 13. ATTRIBUTION.md lists every image. Needs pycocotools.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_tools.formats.shapes import draw

LICENCES = (4, 5, 7)
SHORT_SIDE = 320
QUALITY = 85
VAL_EVERY, VAL_IMAGES = 4, 13
SOURCE_SPLITS = ("train2017", "val2017")
Json = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """One image to take over."""

    entry: Json
    source_split: str
    split: str
    size: tuple[int, int]
    """New height and width."""


def choose(lists: dict[str, Json]) -> list[Picture]:
    """Images with a licence to copy, by id, with their split and new size."""
    taken = [(i, split) for split, data in lists.items() for i in data["images"] if i["license"] in LICENCES]
    pictures = []
    for number, (entry, source_split) in enumerate(sorted(taken, key=lambda pair: pair[0]["id"])):
        in_val = number % VAL_EVERY == VAL_EVERY - 1 and number // VAL_EVERY < VAL_IMAGES
        factor = min(1.0, SHORT_SIDE / min(entry["height"], entry["width"]))
        size = round(entry["height"] * factor), round(entry["width"] * factor)
        pictures.append(Picture(entry, source_split, "val" if in_val else "train", size))
    return pictures


def copy_image(picture: Picture, source: Path, target: Path) -> None:
    """Write the reduced image."""
    with Image.open(source / picture.source_split / picture.entry["file_name"]) as image:
        small = image.convert("RGB").resize(picture.size[::-1], Image.Resampling.LANCZOS)
    path = target / picture.split / picture.entry["file_name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    small.save(path, "JPEG", quality=QUALITY, optimize=True)


def resize_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of ids or a mask at (height, width)."""
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def reduce_panoptic(annotation: Json, picture: Picture, source: Path, target: Path) -> Json:
    """Write the reduced PNG; the annotation with areas and boxes of the new size, without segments that vanished."""
    folder = source / "annotations" / f"panoptic_{picture.source_split}"
    with Image.open(folder / annotation["file_name"]) as png:
        colours = resize_nearest(np.asarray(png.convert("RGB")), picture.size)
    path = target / "annotations" / f"panoptic_{picture.split}" / annotation["file_name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours).save(path, optimize=True)
    ids = colours.astype(np.int32) @ np.array([1, 256, 65536])
    segments = [{**s, **_extent(ids == s["id"])} for s in annotation["segments_info"] if (ids == s["id"]).any()]
    return {**annotation, "segments_info": segments}


def reduce_object(annotation: Json, picture: Picture) -> Json | None:
    """A polygon or RLE annotation at the new size; None where it vanished."""
    from pycocotools import mask as rle

    height, width = picture.entry["height"], picture.entry["width"]
    shape = annotation["segmentation"]
    if isinstance(shape, list):
        scale = np.array([picture.size[1] / width, picture.size[0] / height])
        shape = [(np.reshape(p, (-1, 2)) * scale).round(2).ravel().tolist() for p in shape]
        mask = draw(shape, picture.size)
    else:
        mask = resize_nearest(draw(shape, (height, width)).astype(np.uint8), picture.size)
        packed = rle.encode(np.asfortranarray(mask))
        shape = {"size": list(picture.size), "counts": packed["counts"].decode("ascii")}
    if not mask.any():
        return None
    return {**annotation, "segmentation": shape, **_extent(mask > 0)}


def _extent(mask: np.ndarray) -> Json:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
    return {"bbox": box, "area": int(mask.sum())}


def reduce_lists(
    stem: str, source: Path, target: Path, pictures: list[Picture], reduce: Callable[[Json, Picture], Json | None]
) -> None:
    """Write annotations/{stem}_{train,val}.json of the chosen images."""
    lists = {s: _read(source / "annotations" / f"{stem}_{s}.json") for s in SOURCE_SPLITS}
    (target / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        here = [p for p in pictures if p.split == split]
        annotations = [
            reduced
            for p in here
            for a in lists[p.source_split]["annotations"]
            if a["image_id"] == p.entry["id"] and (reduced := reduce(a, p)) is not None
        ]
        images = [{**p.entry, "height": p.size[0], "width": p.size[1]} for p in here]
        first = lists[SOURCE_SPLITS[0]]
        kept = {key: first[key] for key in ("info", "licenses", "categories")}
        data = {**kept, "images": images, "annotations": annotations}
        path = target / "annotations" / f"{stem}_{split}.json"
        path.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")


def attribution(folders: dict[str, list[Picture]], licences: list[Json]) -> str:
    """The table of images: file, where it came from, licence, what was changed."""
    names = {licence["id"]: f"[{licence['name']}]({licence['url']})" for licence in licences}
    lines = [
        "# Attribution",
        "",
        "Images of COCO 2017, from Flickr under the licence named; the number in the url leads to the author's page.",
        "Annotations: COCO 2017 panoptic, instances and COCO-Stuff, CC BY 4.0, reduced with their images.",
        "",
        "| file | source | licence | change |",
        "| --- | --- | --- | --- |",
    ]
    for folder, pictures in folders.items():
        for p in pictures:
            before = f"{p.entry['width']}x{p.entry['height']}"
            change = f"reduced from {before} to {p.size[1]}x{p.size[0]}, re-encoded as JPEG"
            file = f"{folder}/{p.split}/{p.entry['file_name']}"
            lines.append(f"| {file} | {p.entry['flickr_url']} | {names[p.entry['license']]} | {change} |")
    return "\n".join(lines) + "\n"


def make(source: Path, target: Path) -> None:
    """Write the whole sample."""
    panoptic, stuff = source / "coco_panoptic", source / "coco_stuff"
    lists = {s: _read(panoptic / "annotations" / f"panoptic_{s}.json") for s in SOURCE_SPLITS}
    chosen = {
        "coco_panoptic": choose(lists),
        "coco_stuff": choose({s: _read(stuff / "annotations" / f"stuff_{s}.json") for s in SOURCE_SPLITS}),
    }
    for folder, pictures in chosen.items():
        for picture in pictures:
            copy_image(picture, source / folder, target / folder)
    out = target / "coco_panoptic"
    reduce_lists("panoptic", panoptic, out, chosen["coco_panoptic"], lambda a, p: reduce_panoptic(a, p, panoptic, out))
    for stem in ("instances", "stuff"):
        reduce_lists(stem, stuff, target / "coco_stuff", chosen["coco_stuff"], reduce_object)
    text = attribution(chosen, lists[SOURCE_SPLITS[0]]["licenses"])
    (target / "ATTRIBUTION.md").write_text(text, encoding="utf-8")


def _read(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make(Path(sys.argv[1]), Path(sys.argv[2]))
