"""From bytes to training samples on one core, beside the ways of the field; and raw samples from tars."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mf_scale.bench.data_inputs import make_source
from mf_scale.bench.data_peers import Peer, image_peers, peer_input
from mf_scale.config.schema import DataConfig
from mf_scale.data.index import KINDS, Index
from mf_scale.data.making import make_reader, train_rules
from mf_scale.data.order import SampleOrder, Stream, positions
from mf_scale.data.samples import BadSample, webdataset_epoch
from mf_scale.data.transforms import sample_generator, training_sample
from mf_scale.errors import UserError
from mf_scale.rundir import disk_errors

LANES = 64
"""Global batch whose order the raw samples are read in."""
BATCH = 16
"""Samples whose images lie in one array, as a worker hands them over."""
SMALLEST_CROP = 32
SHUFFLE_BUFFER = 1000
"""Samples that webdataset shuffles among."""
Round = Callable[[int], int]
"""Does the work of one round, by number; returns how many samples it made."""


def bench_data(source: str | None, *, images: int, crops: Sequence[int], repeats: int, json_file: str | None) -> str:
    """Measure on the first `images` samples of a source, or on as many made ones; a table to read.

    Every contestant in turn, `repeats` rounds after one that warms up, in CPU seconds of one core; medians. Raises
    UserError as `Index.open`, and where there are fewer images than lanes of the order.
    """
    if min(crops) < SMALLEST_CROP:
        raise UserError(f"a crop of {min(crops)} is too small", remedy=f"Take {SMALLEST_CROP} pixels or more.")
    with tempfile.TemporaryDirectory(prefix="mf-scale-bench-") as folder, _one_core():
        _refuse_few(images)
        index = Index.open(source) if source else make_source(Path(folder), images)
        _refuse_few(index.samples)
        results = {}
        for crop in crops:
            try:
                contestants, absent = _image_contestants(index, min(images, index.samples), crop)
            except BadSample as bad:
                raise UserError(
                    f"a sample of the source does not decode: {bad}",
                    where=index.source,
                    remedy="`python -m data_tools verify` lists all such samples; the benchmark wants a sound source.",
                ) from bad
            results[f"training samples of {crop} x {crop}"] = measure(contestants, repeats)
        results["raw samples from tars, shuffled"] = measure(_raw_contestants(index), repeats)
    summary = {"source": source or f"{images} made images of 640 x 480", "repeats": repeats, "absent": absent}
    if json_file:
        with disk_errors(Path(json_file)):
            Path(json_file).write_text(json.dumps({**summary, "results": results}, indent=1), encoding="utf-8")
    return _table(summary, results)


def _refuse_few(images: int) -> None:
    if images < LANES:
        raise UserError(
            f"{images} images are too few to be read in a shuffled order",
            remedy=f"Take --images={LANES} or more, and a source of as many.",
        )


def _image_contestants(index: Index, images: int, crop: int) -> tuple[dict[str, Round], str]:
    """Ours from the tars, whose bytes the system has in memory, and the peers' from members already taken out."""
    config = DataConfig(crop=[crop, crop], task=KINDS[index.kind][0])
    reader, rules = make_reader(index, config), train_rules(index, config.task)
    inputs = [peer_input(reader.members(i).image, reader.load_exact(i)) for i in range(images)]
    peers, absent = image_peers(crop)

    def ours(number: int) -> int:
        for i in range(images):
            if i % BATCH == 0:
                batch = np.empty((BATCH, 3, crop, crop), np.uint8)
            training_sample(reader.load_exact(i), config, rules, sample_generator(number, i), batch[i % BATCH])
        return images

    def way(peer: Peer) -> Round:
        def run(number: int) -> int:
            for i, given in enumerate(inputs):
                peer.make(given, sample_generator(number, i))
            return images

        return run

    return {"mf_scale": ours, **{peer.name: way(peer) for peer in peers}}, absent


def _raw_contestants(index: Index) -> dict[str, Round]:
    """The members of every sample in a shuffled order: ours by blocks and singly, json read, and webdataset's."""
    contestants = {f"mf_scale, shuffle {shuffle}": _raw(index, shuffle) for shuffle in ("blocks", "full")}
    paths = [path for shard in index.shards if (path := index.storage.local_path(shard.name))]
    if paths:
        contestants["webdataset"] = lambda _: sum(1 for _ in webdataset_epoch(paths, SHUFFLE_BUFFER))
    return contestants


def _raw(index: Index, shuffle: str) -> Round:
    config = DataConfig()
    stream = Stream(
        source=0,
        digest=index.digest,
        samples=index.samples,
        length=index.samples,
        count=LANES,
        seed=0,
        block_samples=config.block_samples,
        shuffle=shuffle,
        repeat_threshold=0.0,
        origin=0,
        first_epoch=0,
    )
    order, reader, steps = SampleOrder(stream, index.shard_samples), make_reader(index, config), index.samples // LANES

    def run(number: int) -> int:
        for step in range(number * steps, (number + 1) * steps):
            for lane, sample_id in enumerate(order.sample_ids(positions(stream, step))):
                reader.members(int(sample_id), lane if shuffle == "blocks" else None)
        return steps * LANES

    return run


def measure(contestants: dict[str, Round], repeats: int) -> dict[str, dict[str, float]]:
    """Samples a CPU second, each contestant in turn: the median of the rounds, and how often ours is as fast."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1 + repeats):
        for name, run in contestants.items():
            began = time.process_time()
            samples = run(number)
            if number:
                rates[name].append(samples / (time.process_time() - began))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    ours = next(iter(medians.values()))
    return {name: {"samples_per_s": rate, "ours_is_faster": ours / rate} for name, rate in medians.items()}


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """This process on one core, its libraries without threads."""
    import torch

    threads, cores = (cv2.getNumThreads(), torch.get_num_threads()), os.sched_getaffinity(0)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])


def _table(summary: dict[str, Any], results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [f"{summary['source']}, one core, {summary['repeats']} rounds in turn, medians"]
    for title, rates in results.items():
        lines.append(f"{title:<36}{'samples/s':>12}{'mf_scale is':>14}")
        for name, rate in rates.items():
            faster = "" if rate["ours_is_faster"] == 1 else f"{rate['ours_is_faster']:.1f}x"
            lines.append(f"  {name:<34}{rate['samples_per_s']:>12,.0f}{faster:>14}")
    if summary["absent"]:
        lines.append(f"not measured: {summary['absent']}")
    return "\n".join(lines)
