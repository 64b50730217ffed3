"""Loader: what the trainer and the evaluator iterate. The order is that of `order`, whoever reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mf_scale.config.schema import DataConfig
from mf_scale.data.batch import Batch
from mf_scale.data.collate import blank_sample, collate, join
from mf_scale.data.decode import Federated
from mf_scale.data.federated import mask_row, partly_known
from mf_scale.data.index import Index
from mf_scale.data.making import MadeSample, SourceMaker, make_reader, target_rules, train_rules
from mf_scale.data.order import SampleOrder, positions, rank_lanes, worker_share
from mf_scale.data.places import Note, Places
from mf_scale.data.samples import BadSample
from mf_scale.data.sources import order_of
from mf_scale.data.state import DataState
from mf_scale.data.targets import make_targets
from mf_scale.data.transforms import ModelSample, fitted_sample
from mf_scale.data.workers import worker_parts
from mf_scale.errors import UserError

AHEAD = 2
"""Evaluation items prepared ahead by a thread."""
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class EvalSample:
    """A validation sample at its original size."""

    key: str
    image: np.ndarray
    """uint8 [H,W,3], RGB."""
    segment_map: np.ndarray
    """int16 [L,H,W]; unlabelled pixels are NONE, crowd segments stay."""
    labels: np.ndarray
    """int64 [T]."""
    segment_layer: np.ndarray
    """int64 [T]."""
    crowd: np.ndarray
    """bool [T]."""
    weight: int
    """1, or 0 for a repeat that only keeps the ranks in step."""
    federated: Federated | None = None
    """What was looked for in the image; None: every class."""


@dataclass(frozen=True)
class RankStream(IterableDataset[Any]):
    """One rank's stream of parts; each worker process yields its share."""

    indexes: tuple[Index, ...]
    orders: Mapping[str, SampleOrder]
    """By digest; made before the workers are forked, which share the memory."""
    state: DataState
    """Its segments from `step` on differ in nothing but where they are in the same streams."""
    config: DataConfig
    lanes: np.ndarray
    step: int
    places: Places
    masked: bool = False
    """Batches have a class mask."""

    def __iter__(self) -> Iterator[Batch | Exception]:
        """Parts from `step` on, endless. What ends the run travels as an item, so that it arrives as it is."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = worker_share(self.lanes, worker, workers)
        makers = {
            index.digest: SourceMaker(
                index, number, self.orders[index.digest], self.config, len(self.orders), self.masked
            )
            for number, index in enumerate(self.indexes)
            if index.digest in self.orders
        }
        step = self.step + share.first
        try:
            while True:
                yield self._part(step, share.lanes, makers, partial(self.places.note, worker))
                step += share.stride
        except UserError as error:
            yield error

    def _part(self, step: int, lanes: np.ndarray, makers: Mapping[str, SourceMaker], note: Note) -> Batch:
        made: list[MadeSample] = []
        images = np.empty((len(lanes), 3, *self.config.crop), np.uint8)
        for stream, own in self.state.at(step).split(lanes):
            places = images[len(made) : len(made) + len(own)]
            made += makers[stream.digest].make(stream, own, step, places, note)
        events = [event for one in made for event in one.events]
        mask = [one.class_mask for one in made if one.class_mask is not None]
        samples, keys = [one.sample for one in made], [one.key for one in made]
        return collate(samples, keys, events, images, np.stack(mask) if self.masked else None)


def _never() -> bool:
    return False


def train_steps(
    indexes: Sequence[Index],
    state: DataState,
    config: DataConfig,
    *,
    rank: int,
    world: int,
    step: int,
    give_up: Callable[[], bool] = _never,
) -> Generator[tuple[int, Batch], None, None]:
    """Endless (step, this rank's samples of the step in lane order) from `step` on; CPU tensors.

    It ends only where `give_up`, asked about once a second while the workers keep it waiting, is true. Without workers
    nobody asks: a read, with its retries, comes to its end first. Workers start at the first `next`; `.close()` ends
    them quietly. Quarantined samples are in the Batch's events.
    Raises UserError (a shard that went), GuardError (a block without a good sample), StorageError (reads that
    failed for good), RuntimeError naming rank, worker and its last sample where a worker died.
    """
    segment = state.at(step)
    by_digest = {index.digest: index for index in indexes}
    if not all(stream.digest in by_digest for stream in segment.streams):
        raise UserError(
            "the data state belongs to another index",
            where=", ".join(index.source for index in indexes),
            remedy="Open a segment first.",
        )
    orders = {stream.digest: order_of(by_digest[stream.digest], stream) for stream in segment.streams}
    for stream in segment.streams:  # the epoch's order of blocks, before the workers are forked
        orders[stream.digest].sample_ids(positions(stream, step)[:1])
    lanes = rank_lanes(segment.global_batch, rank, world)
    places, masked = Places(indexes, max(1, config.workers)), any(partly_known(index) for index in indexes)
    return _steps(RankStream(tuple(indexes), orders, state, config, lanes, step, places, masked), rank, give_up)


def _steps(stream: RankStream, rank: int, give_up: Callable[[], bool]) -> Generator[tuple[int, Batch], None, None]:
    workers, ahead = stream.config.workers, stream.config.prefetch_steps
    if workers:
        parts: Iterator[Any] = worker_parts(
            stream, workers=workers, prefetch=ahead, rank=rank, give_up=give_up, last=stream.places.describe
        )
    else:
        parts = iter(stream)
    per_step = max(1, workers) if len(stream.lanes) >= workers else 1
    step = stream.step
    try:
        while True:
            found = [_unpack(part) for part in islice(parts, per_step)]
            if len(found) < per_step:  # given up
                return
            yield step, join(found)
            step += 1
    finally:
        if isinstance(parts, Generator):
            parts.close()


def _unpack(item: Batch | Exception) -> Batch:
    if isinstance(item, Exception):
        raise item
    return item


def loss_batches(index: Index, config: DataConfig, *, count: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
    """The first `count` samples in fixed geometry (whole, fitted into data.crop), each once over all ranks.

    Ranks get the same number of Batches, all of `batch` places: surplus ones, at the end of a Batch, hold a blank
    sample with key "" (no segment, every pixel ignored). A sample that does not decode is replaced by one, with its
    event.
    """
    count = min(count, index.samples)
    own = -(-count // world)
    places = range(rank, -(-own // batch) * batch * world, world)
    reader, rules = make_reader(index, config), train_rules(index, config.task)
    masked = partly_known(index)

    def make(sample_ids: range) -> Batch:
        samples, keys, events = list[ModelSample](), list[str](), list[dict[str, Any]]()
        mask = np.zeros((len(sample_ids), len(index.vocabulary)), np.uint8) if masked else None
        for sample_id in (i for i in sample_ids if i < count):
            try:
                stored = reader.load_exact(sample_id)
            except BadSample as bad:
                events.append(reader.event(sample_id, str(bad), ""))
                continue
            row = mask_row(stored, index, masked)
            if mask is not None and row is not None:
                mask[len(samples)] = row
            samples.append(fitted_sample(stored, config.crop, rules))
            keys.append(stored.key)
        blanks = len(sample_ids) - len(samples)
        blank = [blank_sample(config.crop)] * blanks
        return collate(samples + blank, keys + [""] * blanks, events, class_mask=mask)

    return _ahead(make, [places[i : i + batch] for i in range(0, len(places), batch)])


def eval_samples(
    index: Index, config: DataConfig, *, rank: int, world: int, samples: int = 0
) -> Generator[EvalSample, None, None]:
    """Samples rank, rank + world, … whole; every rank yields as many, the last round padded with weight 0.

    `samples`: the first ones of the source only (0: all). Raises UserError for a sample that does not decode: an
    evaluation that leaves one out is another evaluation.
    """
    count = min(samples or index.samples, index.samples)
    return eval_samples_at(index, config, range(rank, -(-count // world) * world, world), count)


def eval_samples_at(
    index: Index, config: DataConfig, places: Sequence[int], count: int
) -> Generator[EvalSample, None, None]:
    """The samples at these places of the source's first `count`; one beyond comes again from the start, weight 0."""
    reader = make_reader(index, config)
    rules = target_rules(index, config.task, crowd="keep", unlabelled="none")

    def make(place: int) -> EvalSample:
        try:
            stored = reader.load_exact(place % count)
        except BadSample as bad:
            record = index.sample(place % count)
            raise UserError(
                f"sample {record.key} does not decode: {bad}",
                where=f"{index.source}, {record.shard} at byte {record.offset}",
                remedy="Pack the source again; `python -m data_tools verify` lists all such samples.",
            ) from bad
        made = make_targets(stored.stored_map, stored, rules)
        weight = int(place < count)
        found = made.segment_map, made.labels, made.segment_layer, made.crowd
        return EvalSample(stored.key, stored.image, *found, weight, stored.federated)

    return _ahead(make, places)


def _ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Generator[Made, None, None]:
    """`make` of every item, in order, some of them ahead in one thread (the reader is not for several)."""
    pending: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            for item in items:
                pending.append(pool.submit(make, item))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
