"""Predictions with known faults: real annotations, shifted, swollen, renamed, left out, invented, of equal scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_masks

from mf_scale.data.batch import NONE
from mf_scale.data.decode import Federated
from mf_scale.data.loader import EvalSample
from mf_scale.evaluation.inference import Instances

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_tools" / "sample"
LVIS = ROOT.parent / "shared" / "data" / "lvis_val_100" / "lvis_val_100.json"


@dataclass(frozen=True)
class Listed:
    """A list in COCO's form: its images as samples, its categories in order."""

    samples: list[EvalSample]
    categories: list[dict[str, Any]]

    @property
    def labels(self) -> dict[int, int]:
        return {category["id"]: label for label, category in enumerate(self.categories)}


def listed_instances(path: Path, *, most: int = 100) -> Listed:
    """The images of a list, without pixels: every instance on a layer of its own, so that none loses a pixel."""
    data = json.loads(path.read_text())
    categories = sorted(data["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories)}
    samples = []
    for image in data["images"][:most]:
        size = image["height"], image["width"]
        shapes = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        masks = [m for a in shapes if (m := _drawn(a["segmentation"], size)).any()]
        shapes = [a for a in shapes if _drawn(a["segmentation"], size).any()]
        layers = np.full((max(1, len(masks)), *size), NONE, dtype=np.int16)
        for layer, mask in enumerate(masks):
            layers[layer][mask] = layer
        federated = None
        if "neg_category_ids" in image:
            said = [[labels[k] for k in image[name]] for name in ("neg_category_ids", "not_exhaustive_category_ids")]
            federated = Federated(*(np.array(values, dtype=np.int64) for values in said))
        samples.append(
            EvalSample(
                str(image["id"]),
                np.zeros((*size, 3), dtype=np.uint8),
                layers,
                np.array([labels[a["category_id"]] for a in shapes], dtype=np.int64),
                np.arange(len(shapes)),
                np.array([bool(a.get("iscrowd", 0)) for a in shapes], dtype=bool),
                1,
                federated,
            )
        )
    return Listed(samples, categories)


def _drawn(shape: Any, size: tuple[int, int]) -> np.ndarray:
    """A polygon or run lengths as a mask, as COCO's own tools draw it."""
    if isinstance(shape, list):
        runs = coco_masks.merge(coco_masks.frPyObjects(shape, *size))
    else:
        runs = coco_masks.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
    return np.asarray(coco_masks.decode(runs)).astype(bool)


def disturbed(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The mask moved by a few pixels, and grown or shrunk."""
    moved = np.roll(mask, random.integers(-6, 7, 2), (0, 1)).astype(np.uint8)
    kernel = np.ones((int(random.integers(1, 9)),) * 2, dtype=np.uint8)
    return np.asarray((cv2.dilate if random.random() < 0.5 else cv2.erode)(moved, kernel)).astype(bool)


def found_instances(sample: EvalSample, classes: int, random: np.random.Generator) -> Instances:
    """Disturbed instances of a sample, best first; scores in steps of 0.1, so that many are equal."""
    size = sample.image.shape[:2]
    masks, labels = [], []
    for i, label in enumerate(sample.labels.tolist()):
        for _ in range(random.choice([0, 1, 1, 1, 2])):  # some are missed, some found twice
            masks.append(disturbed(sample.segment_map[sample.segment_layer[i]] == i, random))
            labels.append(label if random.random() < 0.85 else int(random.integers(classes)))
    nearby = [*sample.labels.tolist(), *([] if sample.federated is None else sample.federated.negative.tolist())]
    for _ in range(6):  # invented
        blob = cv2.resize(random.random((4, 4), dtype=np.float32), size[::-1], interpolation=cv2.INTER_CUBIC) > 0.75
        masks.append(blob)
        labels.append(int(random.choice(nearby)) if nearby and random.random() < 0.7 else int(random.integers(classes)))
    kept = [i for i, mask in enumerate(masks) if mask.any()]
    scores = np.round(random.random(len(kept)), 1).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    rows = np.stack([np.packbits(masks[kept[i]], axis=-1) for i in order])
    return Instances(
        torch.tensor([labels[kept[i]] for i in order]),
        torch.from_numpy(scores[order]),
        torch.arange(len(order)),
        torch.from_numpy(rows),
        (size[0], size[1]),
    )
