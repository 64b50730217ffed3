"""Mask AP of one class from what its images hold: COCO's evaluation by faster-coco-eval (its only import).

A class is evaluated by itself, on the images where it is marked or found: AP is a mean over classes, and an image
without either adds nothing. So the library never sees images x classes, which for a large vocabulary does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

AREAS = ("all", "small", "medium", "large")
"""COCO's ranges of a mask's area: all, below 32^2 pixels, to 96^2, above."""
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""What `class_ap` gives, in order."""
COCO_MOST, LVIS_MOST = 100, 300
"""Detections that count: of a class in an image (COCO), of an image (LVIS)."""
_CATEGORY = 1


@dataclass(frozen=True)
class ClassInImage:
    """One class in one image: what is marked and what was found; masks as COCO's compressed run lengths."""

    position: int
    """Of the image in the source: images are taken in this order, which settles equal scores."""
    size: tuple[int, int]
    """H, W."""
    marked: list[tuple[str, int, bool]]
    """Run lengths, pixels, crowd."""
    found: list[tuple[str, float]]
    """Run lengths, score; best first."""
    not_exhaustive: bool
    """Not every instance is marked: what is found beyond them is neither right nor wrong."""


def class_ap(images: Sequence[ClassInImage], *, federated: bool, boundary: bool) -> NDArray[np.float64]:
    """COLUMNS of one class in 0..1, -1 where it has no instance (of that area); fp64 [6].

    `boundary`: on the smaller of mask IoU and boundary IoU (Cheng et al. 2021, dilation 2% of the diagonal).
    `federated`: LVIS's rules; what was found of a class that was not looked for is not to be in `images`.
    """
    truth, found = _datasets(images)
    evaluation = COCOeval_faster(
        truth,
        truth.loadRes(found),
        "boundary" if boundary else "segm",
        lvis_style=federated,
        boundary_cpu_count=1,
        rle_iou_max_workers=1,  # the ranks are the parallel part
    )
    evaluation.params.maxDets = [LVIS_MOST if federated else COCO_MOST]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, 0, :, -1]  # [thresholds,recalls,areas]
    by_threshold = precision.mean(1)  # all of a class are -1 or none is
    thresholds = evaluation.params.iouThrs.tolist()
    at = [by_threshold[thresholds.index(threshold), 0] for threshold in (0.5, 0.75)]
    means = by_threshold.mean(0)
    return np.array([means[0], *at, *means[1:]], dtype=np.float64)


def _datasets(images: Sequence[ClassInImage]) -> tuple[COCO, list[dict[str, Any]]]:
    """The marked instances as a COCO dataset of one category, and the found ones as a list of results."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    entries = []
    for image in images:
        size = list(image.size)
        entries.append(
            {
                "id": image.position,
                "height": size[0],
                "width": size[1],
                "neg_category_ids": [_CATEGORY],  # verified by being here
                "not_exhaustive_category_ids": [_CATEGORY] if image.not_exhaustive else [],
            }
        )
        of_class = {"image_id": image.position, "category_id": _CATEGORY}
        for counts, area, crowd in image.marked:
            mask = {"size": size, "counts": counts}
            number = len(annotations) + 1
            annotations.append({"id": number, **of_class, "segmentation": mask, "area": area, "iscrowd": int(crowd)})
        for counts, score in image.found:
            results.append({**of_class, "segmentation": {"size": size, "counts": counts}, "score": score})
    categories = [{"id": _CATEGORY, "name": "class", "frequency": "f"}]
    return COCO({"images": entries, "annotations": annotations, "categories": categories}), results
