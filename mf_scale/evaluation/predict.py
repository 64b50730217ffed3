"""Prediction on image files: an overlay with legend (PNG), a 16-bit segment map (PNG) and its segments (JSON) each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from mf_scale.data.decode import IMAGE_FORMATS, UNREADABLE
from mf_scale.errors import EXIT_USER, UserError
from mf_scale.evaluation.forward import Answer, answer
from mf_scale.evaluation.inference import Instances
from mf_scale.evaluation.loading import LoadedModel, load_model
from mf_scale.evaluation.rle import bounding_box, coco_mask
from mf_scale.rundir import disk_errors, write_atomically
from mf_scale.tracking.pictures import Segmentation, add_legend, draw_segments, write_png

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Files taken from a folder."""


@dataclass(frozen=True)
class _Found:
    """What a task finds in one image."""

    segment_map: NDArray[Any]
    """[H,W]: index into labels, negative: void."""
    labels: NDArray[np.int64]
    """Class of each index of the map."""
    listed: list[dict[str, Any]]
    """What the JSON file lists."""


def predict_images(images: Sequence[str], run: str, out: str, *, task: str, overrides: Sequence[str] = ()) -> int:
    """Predict every image of files and folders into folder `out` (task: semantic, panoptic or instance); the exit code.

    An input that is no image is a UserError where it is the only one; among several it is told at the end with exit
    code 2, and the others are done.
    """
    files = list(_files(images))
    if not files:
        raise UserError(
            "there is no image in what was given",
            where=" ".join(images),
            remedy=f"Images end in {', '.join(SUFFIXES)}.",
        )
    folder = Path(out)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(run, overrides, device)
    if task == "instance" and not any(loaded.vocabulary.things):
        raise UserError(
            f"vocabulary {loaded.vocabulary.name!r} has no thing class, so there are no instances to find",
            where=str(loaded.checkpoint),
            remedy="Use --task semantic or panoptic.",
        )
    refused: list[UserError] = []
    empty: list[str] = []
    every = 0.2 if sys.stderr.isatty() else 15.0
    for file, name in tqdm(
        list(zip(files, _names(files), strict=True)), desc="predict", unit="image", mininterval=every
    ):
        try:
            image = read_image(file, loaded.config.data.max_pixels)
        except UserError as error:
            refused.append(error)
            continue
        if not _predict(loaded, image, file, folder / name, task):
            empty.append(str(file))
    if len(files) == 1 and refused:
        raise refused[0]
    print(f"{len(files) - len(refused)} of {len(files)} images predicted into {folder}")
    if empty:
        names = ["instance_threshold"] if task == "instance" else ["object_threshold", "overlap_threshold"]
        limits = ", ".join(f"eval.{name}={getattr(loaded.config.eval, name):g}" for name in names)
        print(f"no segment was found in {len(empty)} of them ({limits}): {', '.join(empty[:5])}")
    for refusal in refused:
        print(f"mf-scale: {refusal}", file=sys.stderr)
    return EXIT_USER if refused else 0


def read_image(file: Path, max_pixels: int) -> NDArray[np.uint8]:
    """An image file as uint8 [H,W,3] RGB, upright (its EXIF orientation carried out); raises UserError naming it."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"the image has {width}x{height} pixels, above the limit of {max_pixels}",
                    where=str(file),
                    remedy="Make it smaller.",
                )
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise UserError("the image does not exist", where=str(file), remedy="Check the path.") from error
    except UNREADABLE as error:
        raise UserError(
            f"this is no image that can be read: {error}", where=str(file), remedy="Give JPEG, PNG or WebP files."
        ) from error


def _predict(loaded: LoadedModel, image: NDArray[np.uint8], file: Path, target: Path, task: str) -> int:
    """Predict one image and write its three files; the number of segments found."""
    names = loaded.vocabulary.names
    found = _find(answer(loaded.model, image, loaded.config), loaded, task)
    areas = _areas(found.segment_map, len(found.labels))
    summary = {
        "image": str(file),
        "height": image.shape[0],
        "width": image.shape[1],
        "task": task,
        "checkpoint": str(loaded.checkpoint),
        "void": {"id": 0, "area": int((found.segment_map < 0).sum())},
        "segments": found.listed,
    }
    shown = np.unique(found.labels[areas > 0]).tolist()
    by_area = sorted(shown, key=lambda k: -int(areas[found.labels == k].sum()))
    drawn = draw_segments(image, Segmentation(found.segment_map, found.labels), names)
    write_png(target.with_name(f"{target.name}.overlay.png"), add_legend(drawn, by_area, names))
    write_png(target.with_name(f"{target.name}.map.png"), _ids(found.segment_map))
    write_atomically(target.with_name(f"{target.name}.json"), json.dumps(summary, indent=1, ensure_ascii=False))
    return len(found.listed)


def _find(said: Answer, loaded: LoadedModel, task: str) -> _Found:
    names, things = loaded.vocabulary.names, loaded.vocabulary.things
    if task == "instance":
        return _instances(said.instance(things, loaded.config), names)
    if task == "semantic":
        segment_map: NDArray[Any] = said.semantic()
        segments = [{"label": k, "thing": things[k]} for k in range(len(names))]
    else:
        segment_map, segments = said.panoptic(things, loaded.config)
    areas = _areas(segment_map, len(segments))
    listed = [
        {"id": i + 1, "class": names[s["label"]], **s, "area": int(areas[i])}
        for i, s in enumerate(segments)
        if areas[i]
    ]
    return _Found(segment_map, np.array([s["label"] for s in segments], dtype=np.int64), listed)


def _instances(found: Instances, names: Sequence[str]) -> _Found:
    """Every instance is listed with its whole mask; in the map the better one lies on top."""
    labels, scores = found.labels.cpu().numpy(), found.scores.cpu().tolist()
    segment_map = np.full(found.size, -1, dtype=np.int64)
    listed = []
    for i, label in enumerate(labels.tolist()):
        mask = found.mask(i)
        segment_map[mask & (segment_map < 0)] = i
        entry = {"id": i + 1, "class": names[label], "label": label, "thing": True, "score": scores[i]}
        entry |= {"area": int(mask.sum()), "bbox": bounding_box(mask), "segmentation": coco_mask(mask)}
        listed.append(entry)
    return _Found(segment_map, labels, listed)


def _areas(segment_map: NDArray[Any], count: int) -> NDArray[np.int64]:
    return np.bincount(segment_map[segment_map >= 0].ravel(), minlength=count)


def _ids(segment_map: NDArray[Any]) -> NDArray[np.uint16]:
    """Map values as written: 0 void, else index + 1 (semantic: class + 1)."""
    if segment_map.max(initial=0) >= np.iinfo(np.uint16).max:
        raise UserError("more classes or instances than a 16-bit map can hold", remedy="Use --task panoptic.")
    return (segment_map + 1).astype(np.uint16)


def _files(images: Sequence[str]) -> Iterator[Path]:
    """Files as given, folders by their images in order of name."""
    for given in images:
        path = Path(given)
        if path.is_dir():
            yield from sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())
        else:
            yield path


def _names(files: Sequence[Path]) -> list[str]:
    """A name for each file's results: its stem, numbered where several files share it."""
    taken: set[str] = set()
    names = []
    for file in files:
        name, number = file.stem, 1
        while name in taken:
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name)
        names.append(name)
    return names
