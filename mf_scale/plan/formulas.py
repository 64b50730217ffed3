"""The arithmetic of large runs, a formula a function: bytes, seconds and shares from plain numbers. Pure.

Nothing is rounded here. Sizes are bytes, times seconds unless a name says otherwise.
"""

from __future__ import annotations

import math

from mf_scale.data.repeat import STRIDE

ROW_BYTES = 48
"""Of a row of the index besides its key and class ids: four int32, two int64, the ends of both lists."""
SHARD_BYTES = 139
"""Of a tar in index.json: a name of 16 letters, size, sha256, samples."""
CLASS_BYTES = 63
"""Of a class in index.json, with a name of 11 letters."""


def index_bytes(images: float, key_bytes: float, image_classes: float, shards: float, classes: float) -> float:
    """Bytes of samples.arrow and index.json: a row an image, 4 bytes a class id, an entry a tar and a class."""
    return images * (ROW_BYTES + key_bytes + 4 * image_classes) + shards * SHARD_BYTES + classes * CLASS_BYTES


def blocks_of(images: float, shard_images: float, block_samples: int) -> int:
    """Blocks of a source: a block never crosses a tar, and the last tar may have fewer images."""
    full = math.floor(images / shard_images + 1e-9)  # of a mean, so that three tars are three
    rest = round(images - full * shard_images)
    return full * math.ceil(shard_images / block_samples) + math.ceil(rest / block_samples)


def mean_block(images: float, shard_images: float, block_samples: int) -> float:
    """Images of a block: fewer than asked for where tars end."""
    return images / blocks_of(images, shard_images, block_samples)


def order_bytes(blocks: int, images: float, *, repeats: bool, blocked: bool) -> float:
    """Memory of a process's order: bounds (8 a block), if it is read by blocks those and their ends of two epochs
    (2 x 12), with repeats the sums of factors at the bounds and at every STRIDE images (8 each)."""
    return blocks * (8 + 2 * 12 * blocked) + (8 * (blocks + images / STRIDE) if repeats else 0)


def worker_lanes(lanes: int, workers: int) -> int:
    """Lanes that one of a rank's loader processes reads: its run of them, or all where there are fewer than workers."""
    return lanes if lanes < workers else math.ceil(lanes / max(1, workers))


def buffered_bytes(lanes: int, block_samples: float, image_bytes: float) -> float:
    """Bytes of the blocks that so many lanes hold, one each."""
    return lanes * block_samples * image_bytes


def kept_blocks(budget: float, block_bytes: float) -> int:
    """Blocks that a worker keeps of a source with so many bytes for them; lanes beyond read their samples singly."""
    return int(budget // block_bytes)


def bytes_a_second(global_batch: int, image_bytes: float, step_seconds: float) -> float:
    """That all ranks read of the storage together, where nothing is cached."""
    return global_batch * image_bytes / step_seconds


def requests_a_second(kept: float, singly: float, block: float, step_seconds: float) -> float:
    """Ranged reads of all ranks together: a lane that keeps a block begins one every `block` steps, others each."""
    return (kept / block + singly) / step_seconds


def read_twice(global_batch: int, block_samples: float, images: float) -> float:
    """Of an epoch, what is read once more at most: where a lane ends and the next begins, both read the block whole.
    Above 1 where many lanes lie in a block."""
    return global_batch * block_samples / images


def cached_share(cache_bytes: float, data_bytes: float) -> float:
    """Of a node's reads at most, once its cache is full: a block of the next epoch may be any block."""
    return min(1.0, cache_bytes / data_bytes)


def node_bytes(first_rank: float, other_rank: float, gpus_a_node: int) -> float:
    """Bytes of a checkpoint that the node of rank 0 writes, the one with the most."""
    return first_rank + (gpus_a_node - 1) * other_rank


def save_stall(rank_bytes: float, copy_rate: float, fixed: float) -> float:
    """Seconds that the training waits for the copy of the rank with the most, at bytes a second, and for the commit."""
    return rank_bytes / copy_rate + fixed


def failures_a_day(gpus: int, gpu_hours: float) -> float:
    """Expected failures of a job that any of its GPUs ends."""
    return 24 * gpus / gpu_hours


def seconds_between(a_day: float) -> float:
    """Mean time between so many events a day; infinite without any."""
    return 86_400 / a_day if a_day else math.inf


def save_interval(every_minutes: float, every_steps: int, step_seconds: float | None) -> float | None:
    """Seconds between checkpoints: by the clock or by steps, whichever is sooner; None where neither is known."""
    ways = [60 * every_minutes] if every_minutes else []
    ways += [every_steps * step_seconds] if every_steps and step_seconds else []
    return min(ways) if ways else None


def lost_work(interval: float, behind: float) -> float:
    """Seconds of training that a failure undoes on average: half an interval, and the write that was not committed."""
    return interval / 2 + behind


def best_interval(stall: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose least, for a stall far below the time between failures (Young 1974; the
    first term of Daly 2006)."""
    return math.sqrt(2 * stall * between_failures)


def goodput(interval: float, stall: float, failures: float, cost: float, stops: float, stop_cost: float) -> float:
    """Share of the time that ends up as training: what saves leave, less what failures and stops of a day cost."""
    return interval / (interval + stall) * max(0.0, 1 - (failures * cost + stops * stop_cost) / 86_400)
