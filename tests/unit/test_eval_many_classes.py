"""Mask AP of a large vocabulary: memory and time of a class at a time, beside the library on all of it at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from mf_scale.bench.memory import peak_over_inputs
from mf_scale.data.batch import NONE
from mf_scale.data.loader import EvalSample
from mf_scale.evaluation.inference import Instances
from mf_scale.evaluation.instances import InstanceRecords
from mf_scale.evaluation.rle import coco_mask

SIZE, MARKED, FOUND = (120, 160), 8, 100


def ours(classes: int, images: int) -> float | None:
    """AP of random instances, as an evaluation takes it."""
    random = np.random.default_rng(0)
    masks = [np.roll(_square(), shift, (0, 1)) for shift in range(0, 40, 2)]
    rows = torch.from_numpy(np.stack([np.packbits(mask, axis=-1) for mask in masks]))
    with InstanceRecords(classes, [True] * classes) as records:
        for position in range(images):
            labels = random.integers(classes, size=MARKED)
            layers = np.stack([np.where(masks[i], i, NONE) for i in range(MARKED)]).astype(np.int16)
            nothing = np.zeros(MARKED, dtype=bool)
            image = np.zeros((*SIZE, 3), dtype=np.uint8)
            sample = EvalSample(str(position), image, layers, labels, np.arange(MARKED), nothing, 1)
            found = torch.from_numpy(np.concatenate([labels, random.integers(classes, size=FOUND - MARKED)]))
            scores = torch.linspace(1, 0.01, FOUND)
            records.add(position, sample, Instances(found, scores, torch.arange(FOUND) % len(masks), rows, SIZE))
        results = records.results(boundary=False)
    return results["AP"] if results else None


def library(classes: int, images: int) -> float:
    """The same amount of instances as one dataset."""
    from faster_coco_eval import COCO, COCOeval_faster

    random, runs = np.random.default_rng(0), coco_mask(_square())

    def entry(i: int) -> dict[str, Any]:
        return {"image_id": i % images + 1, "category_id": int(random.integers(classes)), "segmentation": dict(runs)}

    lists = {
        "images": [{"id": i + 1, "height": SIZE[0], "width": SIZE[1]} for i in range(images)],
        "categories": [{"id": k, "name": str(k)} for k in range(classes)],
        "annotations": [{**entry(i), "id": i + 1, "area": 900, "iscrowd": 0} for i in range(MARKED * images)],
    }
    truth = COCO(lists)
    found = truth.loadRes([{**entry(i), "score": float(random.random())} for i in range(FOUND * images)])
    evaluation = COCOeval_faster(truth, found, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    return float(evaluation.eval["precision"].mean())


def _square() -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[10:40, 20:50] = True
    return mask


def _measured(what: str, classes: int, images: int) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-m", __name__, what, str(classes), str(images)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    told = json.loads(run.stdout.splitlines()[-1])
    print(f"{what}: {classes} classes, {images} images: {told['seconds']:.1f} s, {told['mib']:.0f} MiB over the start")
    return told


@pytest.mark.soak
def test_memory_does_not_grow_with_classes_times_images() -> None:
    few, many = _measured("ours", 1000, 60), _measured("ours", 20_000, 60)
    peer = _measured("library", 4000, 60)
    assert many["mib"] < few["mib"] + 100 and many["mib"] < peer["mib"] / 4


if __name__ == "__main__":
    measured = partial({"ours": ours, "library": library}[sys.argv[1]], *map(int, sys.argv[2:]))
    begin, peak = time.monotonic(), peak_over_inputs(measured, torch.device("cpu"))
    print(json.dumps({"seconds": time.monotonic() - begin, "mib": peak}))
