"""Stats: images, segments and pixels of each class of a packed source."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_tools.source import decoded_samples
from mf_scale.data.decode import none_value
from mf_scale.data.index import Index
from mf_scale.data.samples import BadSample


def count_source(source: str, *, progress: Any) -> dict[str, Any]:
    """Counts by class and of the whole source; `progress` wraps an iterable. Samples that do not decode are counted."""
    index = Index.open(source)
    classes = len(index.vocabulary)
    segments, crowds, pixels = (np.zeros(classes, np.int64) for _ in range(3))
    unlabelled = total = bad = 0
    for _, sample in progress(decoded_samples(index), total=index.samples, unit="sample"):
        if isinstance(sample, BadSample):
            bad += 1
            continue
        none = none_value(sample.stored_map.dtype)
        area = np.bincount(sample.stored_map.reshape(-1), minlength=none + 2)
        np.add.at(segments, sample.labels, 1)
        np.add.at(crowds, sample.labels, sample.crowd)
        np.add.at(pixels, sample.labels, area[: len(sample.labels)])
        unlabelled += int((sample.stored_map >= none).all(axis=0).sum())
        total += sample.image.shape[0] * sample.image.shape[1]
    images = index.class_counts()
    rows = [
        {
            "name": info.name,
            "thing": info.thing,
            "images": int(images[i]),
            "segments": int(segments[i]),
            "crowd": int(crowds[i]),
            "pixels": int(pixels[i]),
        }
        for i, info in enumerate(index.vocabulary.classes)
    ]
    return {
        "source": index.source,
        "samples": index.samples,
        "bad_samples": bad,
        "shards": len(index.shards),
        "pixels": total,
        "unlabelled_pixels": unlabelled,
        "classes": rows,
    }


def format_table(counts: dict[str, Any]) -> str:
    """The counts as text, most frequent class first; classes without an image are only named."""
    share = 100.0 / max(counts["pixels"], 1)
    lines = [
        f"{counts['source']}: {counts['samples']} samples ({counts['bad_samples']} do not decode) in "
        f"{counts['shards']} shards, {counts['unlabelled_pixels'] * share:.1f} % of pixels without a segment",
        f"{'class':28} {'kind':6} {'images':>8} {'segments':>9} {'crowd':>6} {'pixels %':>9}",
    ]
    present = [row for row in counts["classes"] if row["images"]]
    for row in sorted(present, key=lambda row: (-row["images"], row["name"])):
        kind, percent = "thing" if row["thing"] else "stuff", row["pixels"] * share
        numbers = f"{row['images']:8} {row['segments']:9} {row['crowd']:6} {percent:9.2f}"
        lines.append(f"{row['name']:28} {kind:6} {numbers}")
    absent = [row["name"] for row in counts["classes"] if not row["images"]]
    if absent:
        lines.append(f"no image of {len(absent)} classes: {', '.join(absent)}")
    return "\n".join(lines)
