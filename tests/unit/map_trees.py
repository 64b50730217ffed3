"""Trees in the layouts of datasets of label maps, drawn from the embedded sample, and what packing makes of them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.source import open_reader
from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.decode import none_value
from mf_scale.data.index import Index
from mf_scale.vocabulary import Vocabulary

DATA_TOOLS = Path(__file__).parents[2] / "data_tools"
SAMPLE = DATA_TOOLS / "sample" / "coco_panoptic"


@dataclass(frozen=True)
class Scene:
    """A real image with its segments, under the classes of another vocabulary."""

    name: str
    jpeg: Path
    labels: np.ndarray
    """int32 [H,W]: label, or NONE where the image is not annotated."""
    numbers: np.ndarray
    """int32 [H,W]: 1, 2, … for the instances of things and 0 elsewhere."""

    @property
    def image(self) -> Image.Image:
        return Image.open(self.jpeg).convert("RGB")


@dataclass(frozen=True)
class Truth:
    """What a packed sample must be."""

    labels: np.ndarray
    """int32 [H,W]: label, NONE or IGNORE."""
    segments: np.ndarray
    """int32 [H,W]: another number for every segment (of one label)."""
    crowd: np.ndarray
    """bool [H,W]."""


def vocabulary(name: str) -> Vocabulary:
    return Vocabulary.load(DATA_TOOLS / "vocabularies" / f"{name}.json")


@functools.cache
def _sample(split: str) -> list[tuple[Path, np.ndarray, list[dict]]]:
    listing = json.loads((SAMPLE / "annotations" / f"panoptic_{split}.json").read_text())
    things = {c["id"]: bool(c["isthing"]) for c in listing["categories"]}
    found = []
    for annotation in listing["annotations"]:
        with Image.open(SAMPLE / "annotations" / f"panoptic_{split}" / annotation["file_name"]) as png:
            codes = np.asarray(png.convert("RGB")).astype(np.int32) @ np.array([1, 256, 65536])
        segments = [{**s, "thing": things[s["category_id"]]} for s in annotation["segments_info"]]
        found.append((SAMPLE / split / Path(annotation["file_name"]).with_suffix(".jpg").name, codes, segments))
    return found


def scenes(classes: Vocabulary, count: int, split: str = "val") -> list[Scene]:
    """`count` images; a COCO thing becomes one of the things of `classes`, stuff one of its stuff (or nothing)."""
    groups = {kind: [i for i, thing in enumerate(classes.things) if thing is kind] for kind in (True, False)}
    made = []
    for jpeg, codes, segments in _sample(split)[:count]:
        labels, numbers = np.full(codes.shape, NONE, np.int32), np.zeros(codes.shape, np.int32)
        number = 0
        for segment in segments:
            group = groups[segment["thing"]]
            if group:
                mask = codes == segment["id"]
                labels[mask] = group[segment["category_id"] % len(group)]
                number += segment["thing"]
                numbers[mask] = number * segment["thing"]
        made.append(Scene(jpeg.stem, jpeg, labels, numbers))
    return made


def ids_of(scene: Scene, classes: Vocabulary, otherwise: int) -> np.ndarray:
    """The source ids of a scene's labels, `otherwise` where it is not annotated."""
    ids = np.array([*(c.source_id for c in classes.classes), otherwise], np.int32)
    return ids[scene.labels]


def semantic_truth(scene: Scene, otherwise: int = IGNORE) -> Truth:
    labels = np.where(scene.labels == NONE, otherwise, scene.labels)
    return Truth(labels, labels, np.zeros(labels.shape, bool))


def panoptic_truth(scene: Scene, otherwise: int, crowd: np.ndarray | None = None) -> Truth:
    labels = np.where(scene.labels == NONE, otherwise, scene.labels)
    crowd = np.zeros(labels.shape, bool) if crowd is None else crowd
    return Truth(labels, labels + 1000 * scene.numbers, crowd)


def save_image(path: Path, scene: Scene) -> None:
    """The JPEG's bytes as they are, or its pixels as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        scene.image.save(path, compress_level=1)
    else:
        path.write_bytes(scene.jpeg.read_bytes())


def save_map(path: Path, values: np.ndarray, mode: str = "L") -> None:
    """Values as a PNG: L, P (with a palette), I;16, or RGB (id = R + 256 G + 65536 B)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "RGB":
        image = Image.fromarray(np.stack([values & 255, values >> 8 & 255, values >> 16], -1).astype(np.uint8))
    elif mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    else:
        image = Image.fromarray(values.astype(np.uint8))
        if mode == "P":
            image.putpalette([(i * 53 + c * 91) % 256 for i in range(256) for c in range(3)])
    image.save(path, compress_level=1)


TWO_PROCESSES = ("--workers", "2", "--shard-size", "2")


def check_packed(target: Path, truths: dict[str, Truth]) -> Index:
    """Every sample of a packed source has the truth's labels, segments and crowds, pixel by pixel."""
    index = Index.open(target)
    reader = open_reader(index)
    seen = {}
    for i in range(index.samples):
        sample = reader.load_exact(i)
        seen[sample.key] = sample
        truth = truths[sample.key]
        none = none_value(sample.stored_map.dtype)
        assert len(sample.stored_map) == 1
        stored = sample.stored_map[0].astype(np.int64)
        place = np.select([stored == none, stored == none + 1], [-2, -1], stored)
        assert (np.array([*sample.labels, NONE, IGNORE])[place] == truth.labels).all(), sample.key
        assert (np.array([*sample.crowd, False, False])[place] == truth.crowd).all(), sample.key
        inside = truth.labels >= 0
        pairs = np.unique(np.stack([stored[inside], truth.segments[inside]]), axis=1)
        assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1] == len(sample.labels), sample.key
    assert seen.keys() == truths.keys()
    return index
