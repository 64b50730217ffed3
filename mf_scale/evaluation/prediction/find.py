"""What a task finds in one image, and how it is drawn and written: COCO's formats.

The map is a PNG: semantic and instance grey (8 bit up to value 255, 16 beyond), panoptic RGB with the id as
R + 256 G + 65536 B, as panopticapi reads it. 0 is void. A semantic value is label + 1; a segment's or instance's id is
its place in the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from mf_scale.config.schema import Config
from mf_scale.errors import UserError
from mf_scale.evaluation.forward import Answer
from mf_scale.evaluation.inference import Instances
from mf_scale.evaluation.prediction.words import Loaded
from mf_scale.evaluation.rle import bounding_box, coco_mask
from mf_scale.tracking.pictures import Segmentation, add_legend, draw_segments
from mf_scale.vocabulary import Vocabulary


@dataclass(frozen=True)
class Found:
    """What a task finds in one image."""

    task: str
    segment_map: NDArray[Any]
    """[H,W]: index into labels, negative: void. Of instances the better one lies on top (filled in by `write`)."""
    labels: NDArray[np.int64]
    """Class of each index of the map."""
    scores: list[float] | None
    """Of each; None: the task has none."""
    instances: Instances | None = None
    """On the CPU."""


@dataclass(frozen=True)
class Written:
    """An image's results, ready for the disk; without files one that could not be read."""

    record: dict[str, Any]
    """Its line: a prediction, or why there is none."""
    name: str
    files: tuple[tuple[str, bytes], ...] = ()
    """(ending of the name, content)."""

    @property
    def quarantined(self) -> bool:
        return not self.files


@dataclass(frozen=True)
class Look:
    """How results are drawn and named."""

    vocabulary: Vocabulary
    overlay: bool
    shown: frozenset[int]
    """Labels that overlays show; empty: all."""


def find(said: Answer, task: str, vocabulary: Vocabulary, config: Config) -> Found:
    """What the model says, for one task."""
    things = vocabulary.things
    if task == "instance":
        found = said.instance(things, config)
        found = Instances(found.labels.cpu(), found.scores.cpu(), found.mask_of.cpu(), found.masks.cpu(), found.size)
        return Found(task, np.full(found.size, -1, np.int32), found.labels.numpy(), found.scores.tolist(), found)
    if task == "semantic":
        return Found(task, said.semantic(), np.arange(len(vocabulary)), None)
    segment_map, segments = said.panoptic(things, config)
    labels = np.array([s["label"] for s in segments], dtype=np.int64)
    return Found(task, segment_map, labels, [float(s["score"]) for s in segments])


def write(loaded: Loaded, found: Found, look: Look) -> Written:
    """One image's record and files."""
    assert loaded.pixels is not None
    listed = _instances(found, look.vocabulary) if found.instances else _segments(found, look.vocabulary)
    endings = [".map.png", *([".overlay.png"] if look.overlay else [])]
    record = {
        "image_id": loaded.image_id,
        "image": loaded.file_name,
        "name": loaded.name,
        "height": loaded.pixels.shape[0],
        "width": loaded.pixels.shape[1],
        "task": found.task,
        "map": f"{loaded.name}.map.png",
        "void": {"id": 0, "area": int((found.segment_map < 0).sum())},
        "segments": listed,
    }
    contents = [_png(_map_pixels(found)), *([_png(_overlay(loaded.pixels, found, look))] if look.overlay else [])]
    return Written(record, loaded.name, tuple(zip(endings, contents, strict=True)))


def refused(loaded: Loaded) -> Written:
    """The record of an image that could not be read."""
    error = loaded.fault
    assert error is not None
    record = {"image_id": loaded.image_id, "image": loaded.file_name, "reason": error.what, "where": error.where}
    return Written({**record, "remedy": error.remedy}, loaded.name)


def categories(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The classes as COCO's files list them: their ids are those of the dataset they were packed from."""
    return [{"id": c.source_id, "name": c.name, "isthing": int(c.thing)} for c in vocabulary.classes]


def _segments(found: Found, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    areas = _areas(found.segment_map, len(found.labels))
    boxes = find_objects(found.segment_map.astype(np.int32) + 1, max_label=len(areas))
    return [
        _entry(i, int(found.labels[i]), vocabulary, None if found.scores is None else found.scores[i])
        | {"area": int(areas[i]), "bbox": _box(boxes[i]), "iscrowd": 0}
        for i in np.flatnonzero(areas).tolist()
    ]


def _instances(found: Found, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Every instance with its whole mask; in the map the better one lies on top."""
    assert found.instances is not None and found.scores is not None
    listed = []
    for i, (label, score) in enumerate(zip(found.labels.tolist(), found.scores, strict=True)):
        mask = found.instances.mask(i)
        found.segment_map[mask & (found.segment_map < 0)] = i
        shape = {"area": int(mask.sum()), "bbox": bounding_box(mask), "segmentation": coco_mask(mask)}
        listed.append(_entry(i, label, vocabulary, score) | shape)
    return listed


def _entry(i: int, label: int, vocabulary: Vocabulary, score: float | None) -> dict[str, Any]:
    info = vocabulary.classes[label]
    entry = {"id": i + 1, "category_id": info.source_id, "class": info.name, "label": label, "thing": info.thing}
    return entry if score is None else {**entry, "score": score}


def _areas(segment_map: NDArray[Any], count: int) -> NDArray[np.int64]:
    return np.bincount(segment_map[segment_map >= 0].ravel(), minlength=count)


def _box(where: tuple[slice, ...]) -> list[int]:
    """[x, y, width, height] in pixels."""
    rows, columns = where
    return [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]


def _map_pixels(found: Found) -> NDArray[Any]:
    """The map as its PNG holds it: grey, or [H,W,3] RGB."""
    ids = found.segment_map + 1
    if found.task == "panoptic":
        return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)
    most = len(found.labels)
    if most > np.iinfo(np.uint16).max:
        raise UserError("more classes than a 16-bit map can hold", remedy="Use --task panoptic.")
    return ids.astype(np.uint8 if most <= np.iinfo(np.uint8).max else np.uint16)


def _overlay(pixels: NDArray[np.uint8], found: Found, look: Look) -> NDArray[np.uint8]:
    """The image with its segments in colour, and a legend of their classes, the largest first."""
    segment_map, labels, names = found.segment_map, found.labels, look.vocabulary.names
    if look.shown:
        hidden = np.array([int(label) not in look.shown for label in labels] + [True])  # the last one is void's, -1
        segment_map = np.where(hidden[segment_map], -1, segment_map)
    areas = np.bincount(labels, weights=_areas(segment_map, len(labels)), minlength=len(names))
    by_area = [k for k in np.argsort(-areas, kind="stable").tolist() if areas[k] > 0]
    drawn = draw_segments(pixels, Segmentation(segment_map, labels), names)
    return add_legend(drawn, by_area, names)


def _png(pixels: NDArray[Any]) -> bytes:
    """uint8 [H,W,3] RGB, or uint8 or uint16 [H,W], as PNG."""
    ready = np.ascontiguousarray(pixels[..., ::-1]) if pixels.ndim == 3 else pixels
    return cv2.imencode(".png", ready)[1].tobytes()
