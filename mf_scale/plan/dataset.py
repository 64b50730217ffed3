"""What the plan takes from the training source, where its index lies on a disk of this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary
from mf_scale.data.index import HEAD, KINDS, Index
from mf_scale.data.making import make_reader, train_rules
from mf_scale.data.samples import BadSample
from mf_scale.data.sources import open_training, training_sources
from mf_scale.data.storage import Storage
from mf_scale.data.transforms import sample_generator, training_sample
from mf_scale.errors import UserError

ASSUMED_SEGMENTS = 30
"""Of an image, where there is no index to look into. The pairs' part of the activations is small."""
_SAMPLES = 64


@dataclass(frozen=True)
class Dataset:
    """The training sources, opened."""

    indexes: tuple[Index, ...]
    note: str
    """Where the facts come from, or why there are none."""

    @property
    def images(self) -> int | None:
        """Of all sources; None: unknown."""
        return sum(index.samples for index in self.indexes) or None

    @property
    def segments(self) -> int:
        """The most of an image."""
        if not self.indexes:
            return ASSUMED_SEGMENTS
        return max(1, *(int(np.max(index.column("segments"))) for index in self.indexes))

    @property
    def classes(self) -> int | None:
        """Of the vocabulary."""
        return len(self.indexes[0].vocabulary) if self.indexes else None


def look_at_dataset(config: Config) -> Dataset:
    """The training sources where all of them are folders with an index; else none, and why. Reads no image.

    Raises UserError where they are there and a training would be refused for them or their vocabulary.
    """
    try:
        sources = [Storage(source.index) for source in training_sources(config.data)]
        folders = [source.local_path(HEAD) for source in sources]
        if any(folder is None for folder in folders):
            return Dataset((), "data.train is remote, and plan reads no network")
        missing = [s.source for s, head in zip(sources, folders, strict=True) if head and not Path(head).is_file()]
        if missing:
            return Dataset((), f"there is no index in {', '.join(missing)} here")
    except UserError as error:
        return Dataset((), error.what)
    indexes = open_training(config.data)
    check_vocabulary(config, indexes[0].vocabulary, where=indexes[0].source)
    return Dataset(indexes, f"from the index of {', '.join(index.source for index in indexes)}")


def worker_rate(config: Config, dataset: Dataset) -> tuple[float, str]:
    """Training samples that one core makes a second, and of what: bytes of the source to image and segment map."""
    if dataset.indexes:
        return _rate(dataset.indexes[0], config), f"{dataset.indexes[0].source}"
    from mf_scale.bench.data_inputs import make_source

    with TemporaryDirectory(prefix="mf-scale-plan-") as folder:
        return _rate(make_source(Path(folder), _SAMPLES), config), f"{_SAMPLES} made images of 640 x 480"


def _rate(index: Index, config: Config) -> float:
    """In CPU seconds of this process, whose libraries have one thread meanwhile; the second look at each sample."""
    import cv2
    import torch

    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        task = config.data.task if config.data.task in KINDS[index.kind] else KINDS[index.kind][0]
        reader, rules = make_reader(index, config.data), train_rules(index, task)
        images = range(min(_SAMPLES, index.samples))
        place = np.empty((3, *config.data.crop), np.uint8)
        made, spent = 0, 0.0
        for turn in range(2):
            for number in images:
                began = time.process_time()
                try:
                    stored = reader.load_exact(number)
                except BadSample:
                    continue  # training quarantines it
                training_sample(stored, config.data, rules, sample_generator(turn, number), place)
                made, spent = made + turn, spent + turn * (time.process_time() - began)
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])
    if not made:
        raise UserError("no sample of the source decodes", where=index.source, remedy="`python -m data_tools verify`.")
    return made / spent
