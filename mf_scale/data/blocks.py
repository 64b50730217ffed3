"""Blocks: the stretches of a shard that are read at once and shuffled as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def block_bounds(shard_samples: Sequence[int] | np.ndarray, block_samples: int) -> np.ndarray:
    """First sample of every block and N behind them, int64 [blocks+1]; a block never crosses a shard."""
    samples = np.asarray(shard_samples, np.int64)
    ends, blocks = np.cumsum(samples), -(-samples // block_samples)
    shard = np.repeat(np.arange(len(samples)), blocks)
    number = np.arange(len(shard)) - (np.cumsum(blocks) - blocks)[shard]
    starts = (ends - samples)[shard] + number * samples[shard] // blocks[shard]
    return np.append(starts, samples.sum())
