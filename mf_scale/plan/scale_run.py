"""What the figures of a plan at scale are made of: a configuration, its ranks, what is known of data and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mf_scale.config.schema import Config
from mf_scale.data.sources import share_batch
from mf_scale.plan import formulas as f
from mf_scale.plan.assumed import Known
from mf_scale.plan.lanes import SourceLanes, look_at_lanes
from mf_scale.plan.written import Written


@dataclass(frozen=True)
class Figure:
    """One number."""

    name: str
    """Of the JSON: it ends in its unit."""
    title: str
    value: float
    shown: str
    symbols: str
    numbers: str


@dataclass(frozen=True)
class Run:
    """One run."""

    config: Config
    ranks: int
    nodes: int
    known: Mapping[str, Known]
    written: Written
    """At the configured stage."""
    step_seconds: float | None

    def of(self, name: str) -> float:
        return self.known[name].value

    @property
    def gpus_a_node(self) -> int:
        return -(-self.ranks // self.nodes)

    @property
    def worker_lanes(self) -> int:
        """At most, also where the batch cannot be shared evenly."""
        return f.worker_lanes(-(-self.config.train.global_batch // self.ranks), self.config.data.workers)

    @property
    def blocked(self) -> bool:
        """Samples are read by blocks, as far as these fit."""
        return self.config.data.shuffle == "blocks"

    @property
    def largest_block(self) -> float:
        """Samples of a block at most: it never crosses a tar."""
        return min(self.config.data.block_samples, self.of("shard_images")) if self.blocked else 1

    @property
    def mean_block(self) -> float:
        """Samples of a block."""
        tar = self.of("shard_images")
        images = self.of("images") if "images" in self.known else tar
        return f.mean_block(images, tar, self.config.data.block_samples) if self.blocked else 1

    @property
    def buffered(self) -> float:
        """Bytes of a worker's blocks; nothing is kept of samples that are read singly."""
        return self.blocked * f.buffered_bytes(self.worker_lanes, self.largest_block, self.of("image_bytes"))

    @cached_property
    def sources(self) -> tuple[SourceLanes, ...]:
        """How the lanes of each are read. Raises UserError where one would have none."""
        data = self.config.data
        counts = share_batch([source.weight for source in data.sources] or [1.0], self.config.train.global_batch)
        slots = f.kept_blocks(data.buffer_mib * 2**20 // len(counts), self.largest_block * self.of("image_bytes"))
        return look_at_lanes(counts, self.ranks, data.workers, slots)

    @property
    def kept(self) -> int:
        """Lanes of a global batch whose blocks are kept."""
        return sum(source.kept for source in self.sources) if self.blocked else 0
