"""Data of the benchmark where no source is given: photo-like JPEGs with segment maps, in tars with an index."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from mf_scale.data.index import SCHEMA, Index
from mf_scale.vocabulary import ClassInfo, Vocabulary

CLASSES, SEGMENTS = 80, 16
"""Classes of the vocabulary, half of them things, and segments of an image."""
SHARD_SAMPLES = 100
JPEG_OPTIONS = [cv2.IMWRITE_JPEG_QUALITY, 75]
"""With chroma at half resolution: 50 KB an image, bits a pixel as in ADE20K, whose recipe is measured."""
OCTAVES, ROUGHNESS, COLOURFULNESS = (240, 120, 60, 30, 15, 7, 3, 1), 0.75, 0.3
"""Cells of the noise that a picture is made of, pixels; how much weaker it is from one to the next; its colour."""
PNG_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 9, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
"""Label maps as they are packed."""


def make_source(folder: Path, images: int, height: int = 480, width: int = 640) -> Index:
    """Write shards of `images` samples into the folder; the same every time. The index stays in memory."""
    rows: list[dict[str, Any]] = []
    shards = []
    for number, first in enumerate(range(0, images, SHARD_SAMPLES)):
        path = folder / f"made-{number:06d}.tar"
        samples = range(first, min(first + SHARD_SAMPLES, images))
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            rows += [{"shard": number, **_write_sample(tar, i, height, width)} for i in samples]
        shards.append({"name": path.name, "size": path.stat().st_size, "sha256": "", "samples": len(samples)})
    classes = tuple(ClassInfo(f"class {i}", i < CLASSES // 2, i) for i in range(CLASSES))
    head = {
        "vocabulary": Vocabulary("made", classes).to_dict(),
        "shards": shards,
        "digest": "made",
        "crowd": "none",
        "unlabelled": "none",
        "kind": "panoptic",
        "labels": None,
        "columns": {},
    }
    return Index(str(folder), head, pa.Table.from_pylist(rows, schema=SCHEMA).combine_chunks())


def _write_sample(tar: tarfile.TarFile, number: int, height: int, width: int) -> dict[str, Any]:
    """Add the members of a sample; its row of the index."""
    generator = np.random.Generator(np.random.PCG64(number))
    segment_map = _regions(generator, height, width)
    labels = [int(label) for label in generator.integers(0, CLASSES, SEGMENTS)]
    segments = [{"label": label, "layer": 0, "thing": label < CLASSES // 2, "crowd": False} for label in labels]
    meta = {"height": height, "width": width, "segments": segments, "origin": {}}
    picture = _picture(generator, segment_map)
    members = {
        "jpg": cv2.imencode(".jpg", picture, JPEG_OPTIONS)[1].tobytes(),
        "json": json.dumps(meta, separators=(",", ":")).encode(),
        "seg.png": cv2.imencode(".png", segment_map, PNG_OPTIONS)[1].tobytes(),
    }
    key, start = f"{number:08d}", tar.offset
    for suffix, data in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    place = {"key": key, "offset": start, "size": tar.offset - start, "height": height, "width": width}
    return {**place, "class_ids": sorted(set(labels)), "segments": SEGMENTS}


def _regions(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Segment map of the regions around random points, their borders wavy, uint8 [H,W]."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    rows += 20 * _noise(generator, 40, height, width)[..., 0]
    columns += 20 * _noise(generator, 40, height, width)[..., 0]
    points = generator.uniform((0, 0), (height, width), (SEGMENTS, 2)).astype(np.float32)
    distances = [(rows - row) ** 2 + (columns - column) ** 2 for row, column in points]
    return np.argmin(distances, axis=0).astype(np.uint8)


def _picture(generator: np.random.Generator, segment_map: np.ndarray) -> np.ndarray:
    """A colour for each segment under noise of all sizes, uint8 [H,W,3]."""
    picture = generator.uniform(60, 200, (SEGMENTS, 3)).astype(np.float32)[segment_map]
    strength = 40.0
    for cell in OCTAVES:
        noise = _noise(generator, cell, *segment_map.shape)
        picture += strength * (noise[..., :1] + COLOURFULNESS * noise)
        strength *= ROUGHNESS
    return np.clip(picture, 0, 255).astype(np.uint8)


def _noise(generator: np.random.Generator, cell: int, height: int, width: int) -> np.ndarray:
    """Smooth noise in -1..1 of cells of some pixels, float32 [H,W,3]."""
    coarse = generator.uniform(-1, 1, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
