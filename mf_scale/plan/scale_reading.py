"""What a run asks of storage: index and order, lanes and their blocks, reads; each figure with its formula."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mf_scale.data.repeat import STRIDE
from mf_scale.plan import formulas as f
from mf_scale.plan.scale_numbers import number, seconds, share, size
from mf_scale.plan.scale_run import Figure, Run
from mf_scale.plan.sizes import GIB

_SINGLY = "samples are read one by one"


def of_data(run: Run) -> Iterator[Figure]:
    """Index, order and data."""
    images, key, classes = (run.of(name) for name in ("images", "key_bytes", "image_classes"))
    block, repeats = run.config.data.block_samples, run.config.data.repeat_threshold > 0
    shards, vocabulary = math.ceil(images / run.of("shard_images")), run.config.model.num_classes or 0
    value = f.index_bytes(images, key, classes, shards, vocabulary)
    yield Figure(
        "index_bytes",
        "index",
        value,
        size(value),
        "images x (48 + key_bytes + 4 x image_classes) + tars x 139 + classes x 63",
        f"{images:,.0f} x (48 + {number(key)} + 4 x {number(classes)}) B + {shards:,} x 139 B + {vocabulary:,} x 63 B",
    )
    blocks = f.blocks_of(images, run.of("shard_images"), block)
    value = f.order_bytes(blocks, round(images), repeats=repeats, blocked=run.blocked)
    more = f" + 8 B x ({blocks:,} + {images:,.0f} / {STRIDE})" if repeats else ""
    yield Figure(
        "order_bytes",
        "order, a process",
        value,
        size(value),
        ("blocks x (8 + 2 x 12)" if run.blocked else "blocks x 8") + f" + 8 x (blocks + images / {STRIDE})" * repeats,
        f"{blocks:,} blocks x {32 if run.blocked else 8} B{more}",
    )
    value = images * run.of("image_bytes")
    yield Figure(
        "data_bytes",
        "data",
        value,
        size(value),
        "images x image_bytes",
        f"{images:,.0f} x {number(run.of('image_bytes'))} B",
    )


def of_lanes(run: Run) -> Iterator[Figure]:
    """Lanes, the blocks they keep, what is read twice, what a cache saves."""
    data, batch, image = run.config.data, run.config.train.global_batch, run.of("image_bytes")
    lanes = batch // run.ranks if batch % run.ranks == 0 else 0
    if not lanes:
        return  # the plan says above that the batch cannot be shared
    own, block = run.worker_lanes, run.largest_block
    yield Figure(
        "lanes",
        "lanes",
        batch,
        f"{batch:,}",
        "global batch; / GPUs of a rank; / workers of a worker",
        f"{batch:,} / {run.ranks:,} = {lanes:,} of a rank, {own:,} of each of {data.workers} workers",
    )
    parted = f" / {len(run.sources)} sources" if len(run.sources) > 1 else ""
    yield Figure(
        "worker_buffer_bytes",
        "blocks, a worker",
        run.buffered,
        size(run.buffered),
        "worker's lanes x min(block_samples, shard_images) x image_bytes",
        f"{own:,} x {number(block)} x {number(image)} B; {_verdict(run)}: data.buffer_mib = {data.buffer_mib}{parted}"
        if run.blocked
        else _SINGLY,
    )
    if "images" in run.known:
        value = f.read_twice(batch, block, run.of("images")) if run.kept else 0.0
        yield Figure(
            "read_twice_share",
            "read twice, at most",
            value,
            share(value) if value <= 1 else f"{number(value)} times",
            "lanes x min(block_samples, shard_images) / images",
            f"{batch:,} x {number(block)} / {run.of('images'):,.0f}" if value else _SINGLY,
        )
    if data.cache_dir and "images" in run.known:
        total = run.of("images") * image
        value = f.cached_share(data.cache_gib * GIB, total)
        yield Figure(
            "cached_share",
            "from the cache",
            value,
            f"up to {share(value)}",
            "cache_gib / data, of a node's reads once it is full",
            f"{data.cache_gib:g} GiB / {size(total)}",
        )


def of_storage(run: Run) -> Iterator[Figure]:
    """Bytes and reads a second."""
    if run.step_seconds is None:
        return
    batch, image, step = run.config.train.global_batch, run.of("image_bytes"), run.step_seconds
    value = f.bytes_a_second(batch, image, step)
    yield Figure(
        "storage_bytes_a_second",
        "from storage",
        value,
        f"{size(value)}/s",
        "global batch x image_bytes / step; / nodes of a node",
        f"{batch:,} x {number(image)} B / {seconds(step)}; {size(value / run.nodes)}/s a node",
    )
    block, kept = run.mean_block, run.kept
    value = f.requests_a_second(kept, batch - kept, block, step)
    whole, singly = f"{number(kept)} / {number(block)}", number(batch - kept)
    both = f"({whole} + {singly})" if 0 < kept < batch else whole if kept else singly
    sizes = [size(block * image)] * (kept > 0) + [size(image)] * (kept < batch)
    yield Figure(
        "reads_a_second",
        "reads",
        value,
        f"{number(value)}/s",
        "(lanes that keep blocks / (images / blocks) + other lanes) / step",
        f"{both} / {seconds(step)}, of {' and '.join(sizes)} each",
    )


def _verdict(run: Run) -> str:
    """Whose blocks are kept, of the worker with the most lanes of a source."""
    if all(source.fits for source in run.sources):
        return "fit"
    told = [
        f"{source.kept_of_worker:,} of {source.of_worker:,} lanes' blocks"
        + (f" of source {place}" if len(run.sources) > 1 else "")
        for place, source in enumerate(run.sources)
    ]
    return f"{', '.join(told)} fit, the others' samples are read singly"
