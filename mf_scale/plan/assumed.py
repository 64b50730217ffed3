"""What a plan has to be told of data and machines: from the index, given with --assume, or assumed, and then why so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from mf_scale.errors import UserError
from mf_scale.plan.dataset import Dataset

LLAMA_GPU_HOURS = 54 * 24 * 16_384 / 419
"""Hours of one GPU between failures that end the job: 419 unexpected ones in 54 days of 16,384 GPUs (Llama 3, 2024)."""


@dataclass(frozen=True)
class Assumption:
    """A figure that no configuration tells."""

    meaning: str
    default: float | None
    """None: what follows from it is left out."""
    source: str
    """Of the default."""
    zero: bool = False
    """It may be 0; others are above it."""


ASSUMPTIONS: dict[str, Assumption] = {
    "images": Assumption("images of all training sources", None, ""),
    "image_bytes": Assumption(
        "stored bytes of an image with its annotation", 165_000.0, "COCO 2017: 19.3 GB of JPEGs for 118,287 images"
    ),
    "key_bytes": Assumption("bytes of an image's key", 12.0, "twelve digits, as COCO's"),
    "image_classes": Assumption("classes of an image", 6.0, "as `mf-scale bench index` makes them", zero=True),
    "shard_images": Assumption("images of a tar", 1000.0, "as `mf-scale bench index` makes them"),
    "gpu_hours": Assumption(
        "hours of one GPU between failures that end the job",
        LLAMA_GPU_HOURS,
        "419 in 54 days of 16,384 GPUs: Llama 3 (Grattafiori et al. 2024)",
    ),
    "preemptions": Assumption("announced stops a day", 0.0, "none", zero=True),
    "start_seconds": Assumption(
        "seconds from a failure to the first step after it", 300.0, "noticed, queued, started: see `startup` of a run"
    ),
    "copy_gib_s": Assumption("GiB/s of a GPU's copy to its host", 10.0, "PCIe 4 x16 shared by neighbours"),
    "save_seconds": Assumption(
        "seconds of a save besides the copy", 0.1, "two gathers over all ranks, a folder, a commit", zero=True
    ),
    "write_gib_s": Assumption("GiB/s that a node writes to the run directory", 1.0, "`mf-scale doctor` measures it"),
}
MOST_IMAGES = 2**53
"""Beyond, a float64 does not hold every whole number."""
_INDEX = ("images", "image_bytes", "key_bytes", "image_classes", "shard_images")


@dataclass(frozen=True)
class Known:
    """A figure and where it comes from."""

    value: float
    source: str
    """index, given, or `assumed: ` and why."""


def parse_assumed(items: Sequence[str]) -> dict[str, float]:
    """The values of some NAME=VALUE; UserError for unknown names and for values that cannot be."""
    found: dict[str, float] = {}
    for item in items:
        name, _, text = item.partition("=")
        if name not in ASSUMPTIONS:
            close = get_close_matches(name, ASSUMPTIONS, 1)
            raise UserError(
                f"{name!r} is nothing that a plan assumes" + (f"; did you mean {close[0]}?" if close else ""),
                where="--assume",
                remedy=f"Take NAME=VALUE of {', '.join(ASSUMPTIONS)}.",
            )
        found[name] = _value(name, text)
    return found


def _value(name: str, text: str) -> float:
    known = ASSUMPTIONS[name]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    possible = value >= 0 if known.zero else value > 0
    if not (possible and math.isfinite(value)) or (name == "images" and value != int(value)):
        kind = "a whole number" if name == "images" else "a number"
        raise UserError(
            f"{name}={text} cannot be: {known.meaning} is {kind}, {'0 or more' if known.zero else 'above 0'}",
            where="--assume",
        )
    if name == "images" and value > MOST_IMAGES:
        raise UserError(f"images={text} cannot be: a plan counts {MOST_IMAGES:,} (2^53) at most", where="--assume")
    return value


def settle(given: Mapping[str, float], dataset: Dataset, global_batch: int) -> dict[str, Known]:
    """Every figure that is known, by name: what is given goes before the index, and that before what is assumed.

    UserError for fewer images than a global batch: no epoch has a step then.
    """
    of_index = _from_index(dataset)
    known: dict[str, Known] = {}
    for name, assumption in ASSUMPTIONS.items():
        if name in given:
            known[name] = Known(given[name], "given")
        elif name in of_index:
            known[name] = Known(of_index[name], "index")
        elif assumption.default is not None:
            known[name] = Known(assumption.default, f"assumed: {assumption.source}")
    images = known.get("images")
    if images is not None and images.source == "given" and images.value < global_batch:
        raise UserError(
            f"{images.value:,.0f} images are fewer than a global batch of {global_batch:,}",
            where="--assume images",
            remedy="Give the images of all training sources together, or a smaller train.global_batch.",
        )
    return known


def _from_index(dataset: Dataset) -> dict[str, float]:
    """Sums and means over all images of the sources; none where a source has no index here."""
    if not dataset.indexes:
        return {}
    images = sum(index.samples for index in dataset.indexes)
    stored = sum(float(np.sum(index.column("size"), dtype=np.float64)) for index in dataset.indexes)
    keys = classes = 0
    for index in dataset.indexes:
        texts, lists = (index.table.column(name).chunk(0) for name in ("key", "class_ids"))
        ends = np.frombuffer(texts.buffers()[1], np.int64, count=len(texts) + 1, offset=texts.offset * 8)
        keys += int(ends[-1] - ends[0])
        offsets = lists.offsets.to_numpy()
        classes += int(offsets[-1] - offsets[0])
    shards = sum(len(index.shards) for index in dataset.indexes)
    values = images, stored / images, keys / images, classes / images, images / shards
    return dict(zip(_INDEX, map(float, values), strict=True))
