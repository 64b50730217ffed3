"""Collate: samples -> Batch, parts of a step -> one Batch, a Batch -> micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mf_scale.data.batch import IGNORE, NO_LABEL, NONE, Batch
from mf_scale.data.targets import Targets
from mf_scale.data.transforms import PAD, ModelSample


def collate(
    samples: Sequence[ModelSample],
    keys: Sequence[str],
    events: Sequence[dict[str, Any]] = (),
    images: np.ndarray | None = None,
    class_mask: np.ndarray | None = None,
) -> Batch:
    """Stack samples of one size; labels are padded to the most segments of any (at least 1), layers likewise.

    `images` uint8 [B,3,h,w] where the samples' images lie in it already; `class_mask` uint8 [B,K], None: all is known.
    """
    most = max(1, *(len(s.targets.labels) for s in samples))
    layers = max(len(s.targets.segment_map) for s in samples)
    labels = np.full((len(samples), most), NO_LABEL, np.int64)
    segment_layer = np.zeros((len(samples), most), np.int64)
    maps = np.full((len(samples), layers, *samples[0].targets.segment_map.shape[1:]), NONE, np.int16)
    for row, sample in enumerate(samples):
        count = len(sample.targets.labels)
        labels[row, :count] = sample.targets.labels
        segment_layer[row, :count] = sample.targets.segment_layer
        maps[row, : len(sample.targets.segment_map)] = sample.targets.segment_map
    return Batch(
        images=torch.from_numpy(np.stack([s.image for s in samples]) if images is None else images),
        segment_map=torch.from_numpy(maps),
        labels=torch.from_numpy(labels),
        segment_layer=torch.from_numpy(segment_layer),
        keys=list(keys),
        class_mask=None if class_mask is None else torch.from_numpy(class_mask),
        events=[*events, *_dropped(sum(s.targets.dropped for s in samples))],
    )


def join(parts: Sequence[Batch]) -> Batch:
    """Parts of a step, in order, as one Batch; labels and layers padded to the largest part's."""
    if len(parts) == 1:
        return parts[0]
    most = max(p.labels.shape[1] for p in parts)
    layers = max(p.segment_map.shape[1] for p in parts)
    events = [event for part in parts for event in part.events]
    dropped = sum(e["count"] for e in events if e["event"] == "dropped_segments")
    return Batch(
        images=torch.cat([p.images for p in parts]),
        segment_map=torch.cat([_pad(p.segment_map, layers, NONE) for p in parts]),
        labels=torch.cat([_pad(p.labels, most, NO_LABEL) for p in parts]),
        segment_layer=torch.cat([_pad(p.segment_layer, most, 0) for p in parts]),
        keys=[key for part in parts for key in part.keys],
        class_mask=None if parts[0].class_mask is None else torch.cat([_mask_of(p) for p in parts]),
        events=[*(e for e in events if e["event"] != "dropped_segments"), *_dropped(dropped)],
    )


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Samples start..stop of a batch as views; the events go with the first cut."""
    return Batch(
        images=batch.images[start:stop],
        segment_map=batch.segment_map[start:stop],
        labels=batch.labels[start:stop],
        segment_layer=batch.segment_layer[start:stop],
        keys=batch.keys[start:stop],
        class_mask=None if batch.class_mask is None else batch.class_mask[start:stop],
        events=batch.events if start == 0 else [],
    )


def blank_sample(crop: Sequence[int]) -> ModelSample:
    """A sample that counts for nothing: grey image, no segment, every pixel ignored."""
    none = np.zeros(0, np.int64)
    segment_map = np.full((1, *crop), IGNORE, np.int16)
    return ModelSample(np.full((3, *crop), PAD, np.uint8), Targets(segment_map, none, none, none.astype(bool), 0))


def _mask_of(part: Batch) -> torch.Tensor:
    assert part.class_mask is not None, "all parts of a step have a class mask, or none has"
    return part.class_mask


def _pad(values: torch.Tensor, size: int, fill: int) -> torch.Tensor:
    """Grow dimension 1 to `size`."""
    if values.shape[1] == size:
        return values
    padding = values.new_full((values.shape[0], size - values.shape[1], *values.shape[2:]), fill)
    return torch.cat([values, padding], dim=1)


def _dropped(count: int) -> list[dict[str, Any]]:
    """At most one event a batch for the segments that cropping left without a pixel."""
    return [{"event": "dropped_segments", "count": count}] if count else []
