"""Stats: how often each class of a packed source occurs, how many segments its images have, how large they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.parallel import each, tick
from data_tools.source import Run, decoded_run, reader_of, sample_runs
from mf_scale.config.schema import DataConfig, SourceConfig
from mf_scale.data.decode import StoredSample, none_value
from mf_scale.data.index import Index
from mf_scale.data.samples import BadSample
from mf_scale.data.unified import seen_in
from mf_scale.unify import LEFT_OUT, UnifiedSource
from mf_scale.vocabulary import Vocabulary

RARE, COMMON = 10, 100
"""Images of a class up to which it is rare, and common; more is frequent (the bands of LVIS)."""
BANDS = ("frequent", "common", "rare", "absent")


@dataclass
class Counts:
    """Sums over samples."""

    segments: np.ndarray
    """int64 [K], as the two below."""
    crowd: np.ndarray
    pixels: np.ndarray
    bad: int = 0
    total: int = 0
    """Pixels."""
    unlabelled: int = 0
    """Pixels without a segment."""
    ignored: int = 0
    """Pixels outside the loss."""
    segments_of_image: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images of each height and width."""

    @staticmethod
    def of(classes: int) -> Counts:
        return Counts(np.zeros(classes, np.int64), np.zeros(classes, np.int64), np.zeros(classes, np.int64))

    def add(self, sample: StoredSample) -> None:
        """Count a sample."""
        stored, none = sample.stored_map, none_value(sample.stored_map.dtype)
        area = np.bincount(stored.reshape(-1), minlength=none + 2)
        np.add.at(self.segments, sample.labels, 1)
        np.add.at(self.crowd, sample.labels, sample.crowd)
        np.add.at(self.pixels, sample.labels, area[: len(sample.labels)])
        nowhere = (stored >= none).all(axis=0)
        ignored = int((nowhere & (stored[0] > none)).sum())
        self.ignored += ignored
        self.unlabelled += int(nowhere.sum()) - ignored
        self.total += stored[0].size
        self.segments_of_image[len(sample.labels)] += 1
        self.sizes[stored.shape[1:]] += 1

    def merge(self, other: Counts) -> None:
        """Add the sums of other samples."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def count_source(
    source: str, *, workers: int = 1, progress: Callable[..., Any], vocabulary: Vocabulary | None = None
) -> dict[str, Any]:
    """Counts by class and of the whole source. Samples that do not decode are counted as such.

    With the `vocabulary` of a run that was trained on the source the classes are that run's; UserError where the source
    has none of them.
    """
    index = Index.open(source)
    seen = index if vocabulary is None else seen_in(vocabulary, index, SourceConfig(source), DataConfig(), source)
    jobs = [(source, index.digest, run) for run in sample_runs(index)]
    counts = Counts.of(len(index.vocabulary))
    with (
        progress(total=index.samples, unit="sample") as bar,
        closing(each(_count_run, jobs, workers=workers, bar=bar)) as results,
    ):
        for part in results:
            counts.merge(part)
    rows = _class_rows(seen, counts if seen.way is None else _mapped(counts, seen.way))
    bands = Counter(row["frequency"] for row in rows)
    return {
        "source": index.source,
        "digest": index.digest,
        "vocabulary": seen.vocabulary.name,
        "kind": index.kind,
        "shards": len(index.shards),
        "bytes": sum(shard.size for shard in index.shards),
        "samples": index.samples,
        "bad_samples": counts.bad,
        "pixels": counts.total,
        "unlabelled_pixels": counts.unlabelled,
        "ignored_pixels": counts.ignored,
        "bands": {band: bands[band] for band in BANDS},
        "segments_per_image": {str(n): counts.segments_of_image[n] for n in sorted(counts.segments_of_image)},
        "sizes": [{"height": h, "width": w, "images": n} for (h, w), n in counts.sizes.most_common()],
        "classes": rows,
    }


def band_of(images: int) -> str:
    """Frequency band of a class with so many images."""
    return "absent" if images == 0 else "rare" if images <= RARE else "common" if images <= COMMON else "frequent"


def _count_run(job: tuple[str, str, Run]) -> Counts:
    reader = reader_of(*job[:2])
    counts = Counts.of(len(reader.index.vocabulary))
    for _, sample in decoded_run(reader, job[2]):
        tick()
        if isinstance(sample, BadSample):
            counts.bad += 1
        else:
            counts.add(sample)
    return counts


def _mapped(counts: Counts, way: UnifiedSource) -> Counts:
    """The counts by class of unified classes; what is left out is gone."""
    kept = way.labels != LEFT_OUT
    mapped = Counts.of(len(way.known))
    for name in ("segments", "crowd", "pixels"):
        np.add.at(getattr(mapped, name), way.labels[kept], getattr(counts, name)[kept])
    return mapped


def _class_rows(index: Index, counts: Counts) -> list[dict[str, Any]]:
    return [
        {
            "name": info.name,
            "thing": info.thing,
            "frequency": band_of(images) if info.frequency is None or not images else info.frequency,
            "images": images,
            "segments": int(counts.segments[label]),
            "crowd": int(counts.crowd[label]),
            "pixels": int(counts.pixels[label]),
        }
        for label, (info, images) in enumerate(
            zip(index.vocabulary.classes, index.class_counts().tolist(), strict=True)
        )
    ]


def format_table(counts: dict[str, Any]) -> str:
    """The counts as text, most frequent class first; classes without an image are only named."""
    share = 100.0 / max(counts["pixels"], 1)
    lines = [
        f"{counts['source']}: {counts['samples']} samples ({counts['bad_samples']} do not decode) in "
        f"{counts['shards']} shards, {counts['unlabelled_pixels'] * share:.1f} % of pixels without a segment, "
        f"{counts['ignored_pixels'] * share:.1f} % ignored",
        "classes: " + ", ".join(f"{number} {band}" for band, number in counts["bands"].items()),
        f"{'class':28} {'kind':6} {'band':8} {'images':>8} {'segments':>9} {'crowd':>6} {'pixels %':>9}",
    ]
    present = [row for row in counts["classes"] if row["images"]]
    for row in sorted(present, key=lambda row: (-row["images"], row["name"])):
        kind, percent = "thing" if row["thing"] else "stuff", row["pixels"] * share
        numbers = f"{row['images']:8} {row['segments']:9} {row['crowd']:6} {percent:9.2f}"
        lines.append(f"{row['name']:28} {kind:6} {row['frequency']:8} {numbers}")
    absent = [row["name"] for row in counts["classes"] if not row["images"]]
    if absent:
        lines.append(f"no image of {len(absent)} classes: {', '.join(absent)}")
    return "\n".join(lines)
