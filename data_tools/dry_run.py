"""Dry run: annotate and encode samples spread over a pack, and write nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from data_tools.encode import encode_sample
from data_tools.pack import Packing
from data_tools.parallel import each, tick
from data_tools.problems import Problems
from data_tools.record import Annotation, BadRecord, Record, spread_over

BLOCK = 512
"""A tar's members begin and end at multiples of it."""


@dataclass
class Trial:
    """What some samples of a pack would become."""

    samples: int = 0
    total: int = 0
    """Samples of the pack."""
    segments: int = 0
    crowd: int = 0
    labels: set[int] = field(default_factory=set)
    beside: int = 0
    """Bytes in the tar beside the image files."""
    notes: Counter[str] = field(default_factory=Counter)

    def bytes_of(self, packing: Packing) -> int:
        """Bytes that all shards will have; exact but for the ends of the tars where all samples were tried."""
        return packing.image_bytes + round(self.beside / max(self.samples, 1) * self.total)


def try_samples(packing: Packing, *, most: int, workers: int, progress: Callable[..., Any]) -> Trial:
    """Try `most` samples (0: all); raises UserError with the counts where some cannot be packed."""
    records = spread_over(packing.source.records, most)
    jobs = [(packing.source.annotate, record) for record in records]
    trial, problems = Trial(total=len(packing.source.records)), Problems()
    with (
        progress(total=len(jobs), unit="sample") as bar,
        closing(each(_try, jobs, workers=workers, bar=bar)) as results,
    ):
        for record, tried in zip(records, results, strict=True):
            if isinstance(tried, str):
                problems.add(tried, record.key)
                continue
            annotation, beside = tried
            trial.samples += 1
            trial.segments += len(annotation.segments)
            trial.crowd += sum(segment.crowd for segment in annotation.segments)
            trial.labels |= {segment.label for segment in annotation.segments}
            trial.beside += beside
            trial.notes.update(annotation.notes)
    problems.refuse(
        f"{len(problems)} of the {len(records)} samples that were tried cannot be packed",
        where=packing.options.split,
        remedy="Repair them or take them out of the lists.",
    )
    return trial


def _try(job: tuple[Callable[[Record], Annotation], Record]) -> tuple[Annotation, int] | str:
    annotate, record = job
    tick()
    try:
        annotation = annotate(record)
        members = encode_sample(record, annotation)
    except BadRecord as bad:
        return str(bad)
    sizes = [len(value) for name, value in members.items() if name != "__key__"]
    beside = sum(BLOCK - (-size // BLOCK) * BLOCK for size in sizes) - record.image.stat().st_size
    # The pixels stay here: only what is counted travels.
    return Annotation(annotation.segment_map[:0], annotation.segments, notes=annotation.notes), beside
