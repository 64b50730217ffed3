"""Where the data of a run stands after a step, and which samples a step takes: for people and for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mf_scale.config.load import load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import validate
from mf_scale.data.index import Index
from mf_scale.data.order import positions
from mf_scale.data.sources import continue_order, open_training, order_of
from mf_scale.data.state import DataState
from mf_scale.errors import UserError
from mf_scale.rundir import RunDir, checkpoint_step, committed_checkpoints, existing_run
from mf_scale.tracking.metrics import read_metrics
from mf_scale.training.past import look_back


@dataclass(frozen=True)
class DataOfRun:
    """The data order of a run, or of one that a configuration describes and nobody has started."""

    config: Config
    sources: tuple[Index, ...]
    data: DataState
    quarantined: list[dict[str, Any]]
    """The `quarantine` records of metrics.jsonl."""


@dataclass(frozen=True)
class SourcePosition:
    """Where one source stands."""

    source: str
    in_batch: int
    """Samples of it in a global batch."""
    epoch: int
    """Epochs that lie behind."""
    offset: int
    """Positions of the present epoch that lie behind."""
    length: int
    """Positions of an epoch."""
    taken: int
    """Positions that lie behind since it goes by the present law, those that were left out included."""


@dataclass(frozen=True)
class TakenSample:
    """A sample of a step."""

    lane: int
    source: str
    shard: str
    key: str
    epoch: int
    position: int
    """In its epoch."""
    replaced_by: str | None
    """The sample that was trained in its place, where it was quarantined."""


def data_of(path: str, step: int | None, overrides: Sequence[str]) -> tuple[DataOfRun, int]:
    """The data order at step `step` (from 1; none: the last one taken) of a run directory or configuration file.

    Also the step that was found. Raises UserError where neither is there.
    """
    if Path(path).is_file():
        config = load_config(path, overrides)
        validate(config)
        if step is not None and step > config.train.steps:
            raise UserError(f"the run has {config.train.steps} steps, there is no step {step}", where=path)
        sources = open_training(config.data)
        return DataOfRun(config, sources, continue_order(config, sources, None, 0)[0], []), step or 0
    found = _last_step(RunDir(existing_run(path))) if step is None else step
    past = look_back(path, max(found, 1), overrides)
    quarantined = [r for r in past.records if r["event"] == "quarantine"]
    return DataOfRun(past.config, past.sources, past.data, quarantined), found


def _last_step(run: RunDir) -> int:
    trained = [int(r["step"]) for r in read_metrics(run.metrics)]
    return max([0, *trained[-1:], *map(checkpoint_step, committed_checkpoints(run))])


def positions_after(found: DataOfRun, step: int) -> list[SourcePosition]:
    """Where each source stands after `step` steps."""
    named = {index.digest: index.source for index in found.sources}
    out = []
    for stream in found.data.at(max(step - 1, 0)).streams:
        taken = (step - stream.origin) * stream.count
        epoch, offset = divmod(taken, stream.length)
        out.append(
            SourcePosition(named[stream.digest], stream.count, stream.first_epoch + epoch, offset, stream.length, taken)
        )
    return out


def samples_of(found: DataOfRun, step: int) -> list[TakenSample]:
    """The samples of step `step` >= 1, in lane order."""
    by_digest = {index.digest: index for index in found.sources}
    taken = [r for r in found.quarantined if r["step"] == step]
    instead = {(r.get("source"), r.get("shard"), r.get("key")): r.get("replaced_by") for r in taken}
    samples: list[TakenSample] = []
    for stream in found.data.at(step - 1).streams:
        index = by_digest[stream.digest]
        stream_positions = positions(stream, step - 1)
        for position, sample_id in zip(
            stream_positions, order_of(index, stream).sample_ids(stream_positions), strict=True
        ):
            record = index.sample(int(sample_id))
            epoch, offset = np.divmod(position, stream.length)
            replaced = instead.get((index.source, record.shard, record.key))
            samples.append(
                TakenSample(len(samples), index.source, record.shard, record.key, int(epoch), int(offset), replaced)
            )
    return samples


def as_rows(found: Sequence[SourcePosition | TakenSample]) -> list[dict[str, Any]]:
    """Plain dictionaries, for JSON."""
    return [asdict(item) for item in found]


def position_table(found: DataOfRun, step: int) -> str:
    """The positions as text."""
    total, batch = found.config.train.steps, found.data.at(max(step - 1, 0)).global_batch
    lines = [
        f"after step {step:,} of {total:,}, global batch {batch}",
        f"{'in a batch':>10} {'epoch':>7} {'position in it':>34}  source",
    ]
    for place in positions_after(found, step):
        share = f"{place.offset:,} of {place.length:,} ({place.offset / place.length:.1%})"
        lines.append(f"{place.in_batch:10} {place.epoch:7,} {share:>34}  {place.source}")
    return "\n".join(lines)


def sample_table(found: DataOfRun, step: int) -> str:
    """The samples of a step as text, a line each."""
    samples = samples_of(found, step)
    sources = len({sample.source for sample in samples})
    lines = [f"step {step:,} takes {len(samples)} samples", f"{'lane':>5} {'epoch':>6}  key"]
    for sample in samples:
        where = f"{sample.source}/{sample.shard}" if sources > 1 else sample.shard
        replaced = f", quarantined: {sample.replaced_by} was trained instead" if sample.replaced_by else ""
        lines.append(f"{sample.lane:5} {sample.epoch:6,}  {sample.key}  ({where}{replaced})")
    return "\n".join(lines)
