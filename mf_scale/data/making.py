"""Making: sample ids of a source -> samples in the form of a batch, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mf_scale.config.schema import DataConfig
from mf_scale.data.federated import mask_row
from mf_scale.data.index import Index
from mf_scale.data.order import SampleOrder, Stream, positions
from mf_scale.data.places import Note
from mf_scale.data.reader import SampleReader
from mf_scale.data.targets import TargetRules
from mf_scale.data.transforms import ModelSample, sample_generator, training_sample

MIB = 1 << 20


class MadeSample(NamedTuple):
    """A sample in the form of a batch."""

    sample: ModelSample
    key: str
    events: list[dict[str, Any]]
    class_mask: np.ndarray | None
    """uint8 [K]; None in a run without."""


class SourceMaker:
    """Makes the samples of one source in one process."""

    def __init__(
        self, index: Index, number: int, order: SampleOrder, config: DataConfig, sources: int, masked: bool
    ) -> None:
        self.number, self.order, self.config, self.masked = number, order, config, masked
        self.reader = make_reader(index, config, sources)
        self.rules = train_rules(index, config.task)

    def make(
        self, stream: Stream, lanes: np.ndarray, step: int, images: np.ndarray, note: Note
    ) -> Iterator[MadeSample]:
        """The samples of some of the stream's lanes at `step`, in lane order; the images go into `images`."""
        places = positions(stream, step)[lanes]
        for lane, position, sample_id, image in zip(lanes, places, self.order.sample_ids(places), images, strict=True):
            note(self.number, int(sample_id))
            stored, events = self.reader.load(int(sample_id), int(lane) if stream.shuffle == "blocks" else None)
            generator = sample_generator(stream.own_seed, int(position))
            sample = training_sample(stored, self.config, self.rules, generator, image)
            yield MadeSample(sample, stored.key, events, mask_row(stored, self.reader.index, self.masked))


def train_rules(index: Index, task: str) -> TargetRules:
    """Rules of training targets: crowd and unlabelled as the index says."""
    return target_rules(index, task, index.crowd, index.unlabelled)


def target_rules(index: Index, task: str, crowd: str, unlabelled: str) -> TargetRules:
    """Rules with a treatment of crowd and unlabelled pixels of one's own."""
    joined = None if index.way is None or not index.way.joined.any() else index.way.joined
    return TargetRules(task, np.array(index.vocabulary.things), crowd, unlabelled, joined)


def make_reader(index: Index, config: DataConfig, sources: int = 1) -> SampleReader:
    """Reader with the configuration's limits; `sources` share the memory for buffers."""
    budget = config.buffer_mib * MIB // sources
    return SampleReader(index, block_samples=config.block_samples, budget=budget, max_pixels=config.max_pixels)
