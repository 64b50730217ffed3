"""Sources: the training sources of a configuration, opened, and their shares of a global batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import count

import numpy as np

from mf_scale.config.data_rules import validation_source
from mf_scale.config.schema import Config, DataConfig, SourceConfig
from mf_scale.data.cache import cache_settings
from mf_scale.data.index import KINDS, Index
from mf_scale.data.order import SampleOrder, Stream
from mf_scale.data.repeat import repeat_factors
from mf_scale.data.state import DataState, SourcePart, open_segment
from mf_scale.data.unified import seen_as_one, seen_in
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary


def training_sources(data: DataConfig) -> list[SourceConfig]:
    """data.sources, or data.train as the only one; UserError where none is named."""
    if data.sources:
        return list(data.sources)
    if not data.train:
        raise UserError(
            "data.train is not set",
            remedy="Name a source that `python -m data_tools pack` wrote: data.train=FOLDER, or several: data.sources.",
        )
    return [SourceConfig(index=data.train)]


def open_training(data: DataConfig) -> tuple[Index, ...]:
    """The training sources, in the configuration's order, all with the labels of one vocabulary.

    Raises UserError where one is named twice or cannot serve the task, and for vocabularies that cannot be made one.
    """
    indexes = tuple(open_other(source, data, None, source.index) for source in training_sources(data))
    refuse_doubles(indexes)
    return seen_as_one(indexes, data)


def refuse_doubles(indexes: Sequence[Index]) -> None:
    """UserError where two training sources hold the same."""
    seen: dict[str, str] = {}
    for index in indexes:
        if index.digest in seen:
            raise UserError(
                "two training sources are the same",
                where=f"{seen[index.digest]}, {index.source}",
                remedy="Name it once; its weight sets how much of a global batch it makes.",
            )
        seen[index.digest] = index.source


def open_validation(data: DataConfig, vocabulary: Vocabulary | None = None) -> Index | None:
    """The validation source, where there is one, with the labels of the run's vocabulary (None: its own).

    Raises UserError where it cannot serve the task, or labels otherwise and nothing is declared of it.
    """
    source = validation_source(data)
    return None if source is None else open_other(source, data, vocabulary, "data.val")


def open_other(source: SourceConfig, data: DataConfig, vocabulary: Vocabulary | None, where: str) -> Index:
    """A source that is not trained on, likewise; `where`: what messages call it."""
    index = Index.open(source.index, cache_settings(data))
    refuse_task(index, data.task)
    return index if vocabulary is None else seen_in(vocabulary, index, source, data, where)


def refuse_task(index: Index, task: str) -> None:
    """UserError where the annotation of a source cannot serve the task."""
    if task not in KINDS[index.kind]:
        raise UserError(
            f"data.task = {task} needs instances, and a segment of this {index.kind} source is all of a class"
            if index.kind == "semantic"
            else f"data.task = {task} needs every pixel annotated, and this source has {index.kind}s only",
            where=index.source,
            remedy=f"Take data.task={' or '.join(KINDS[index.kind])}, or another source.",
        )


def share_batch(weights: Sequence[float], global_batch: int) -> list[int]:
    """Samples of each source in a global batch: its share, to whole numbers by the largest remainder.

    Raises UserError where a source would get none, naming the smallest global batch that gives it one.
    """
    counts = _shares(weights, global_batch)
    if min(counts) > 0:
        return counts
    least = int(sum(weights) / min(weights) / len(weights))  # below, its share cannot be among the largest remainders
    enough = next(size for size in count(max(len(weights), least)) if min(_shares(weights, size)) > 0)
    raise UserError(
        f"a global batch of {global_batch} has no sample of source {counts.index(0)} (counted from 0; weights "
        f"{', '.join(f'{weight:g}' for weight in weights)} give {', '.join(map(str, counts))})",
        where="data.sources",
        remedy=f"The smallest global batch that holds one of each is {enough}; or raise its weight.",
    )


def _shares(weights: Sequence[float], global_batch: int) -> list[int]:
    quotas = np.asarray(weights, np.float64) / sum(weights) * global_batch
    whole = np.floor(quotas).astype(int)
    largest = np.argsort(whole - quotas, kind="stable")
    whole[largest[: global_batch - whole.sum()]] += 1
    return [int(samples) for samples in whole]


def order_of(index: Index, stream: Stream) -> SampleOrder:
    """The order of a source's stream; the repeat factors come from its index."""
    bounds = index.block_bounds(stream.block_samples)
    repeats = repeat_factors(index, stream.repeat_threshold, bounds) if stream.repeat_threshold else None
    return SampleOrder(stream, index.shard_samples, repeats, bounds)


def continue_order(
    config: Config, indexes: Sequence[Index], state: DataState | None, step: int
) -> tuple[DataState, str | None]:
    """The order that a start at `step` with this configuration goes on with, and what changes there in words."""
    data = config.data
    counts = share_batch([source.weight for source in training_sources(data)], config.train.global_batch)
    parts = [
        SourcePart(index.source, index.digest, index.samples, _length(index, data), share, _labels(index, data))
        for index, share in zip(indexes, counts, strict=True)
    ]
    return open_segment(
        state,
        step,
        parts,
        seed=config.seed,
        block_samples=data.block_samples,
        shuffle=data.shuffle,
        repeat_threshold=data.repeat_threshold,
    )


def _length(index: Index, data: DataConfig) -> int:
    if not data.repeat_threshold:
        return index.samples
    return repeat_factors(index, data.repeat_threshold, index.block_bounds(data.block_samples)).length


def _labels(index: Index, data: DataConfig) -> str:
    """Of the mapped labels that repeats are counted by: another map is another order."""
    if index.way is None or not data.repeat_threshold:
        return ""
    return hashlib.sha256(index.way.labels.astype("<i8").tobytes()).hexdigest()[:16]


def describe_sources(indexes: Sequence[Index], state: DataState, step: int) -> list[str]:
    """One line a source of what a global batch takes of it, where there is more to say than one source read plainly."""
    by_digest = {index.digest: index for index in indexes}
    streams = state.at(step).streams
    if len(streams) == 1 and not streams[0].repeat_threshold:
        return []
    return [
        f"source {by_digest[stream.digest].source}: {stream.count} samples of every global batch, "
        f"{stream.samples:,} images" + (f", {stream.length:,} an epoch with repeats" if stream.repeat_threshold else "")
        for stream in streams
    ]
