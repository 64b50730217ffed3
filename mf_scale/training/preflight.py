"""Before a run starts: everything that can be refused is refused here, on rank 0, before anything is changed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary, plan_batch
from mf_scale.data.index import Index, verify_shards
from mf_scale.data.sources import open_training, open_validation
from mf_scale.data.unified import merges_of, way_note, what_changed
from mf_scale.distributed.env import World
from mf_scale.errors import FaultError, UserError
from mf_scale.models.class_embeddings import class_rows
from mf_scale.rundir import (
    MERGES,
    VOCABULARY,
    RunDir,
    committed_checkpoints,
    disk_errors,
    newest_sound_checkpoint,
    resolve_checkpoint,
)
from mf_scale.training.checkpoint import point_latest
from mf_scale.training.class_rows import LENT, class_images, lent_classes
from mf_scale.training.fence import LOCK, Fence
from mf_scale.training.leftovers import DAMAGED, set_aside, sweep, sweep_aside, without_manifest
from mf_scale.training.lock import take_lock
from mf_scale.unify import describe, whole_text
from mf_scale.vocabulary import Vocabulary

_SHARED_SECONDS = 15.0
"""A network file system may show a file that another node wrote some seconds later."""
_CHECKSUM_BYTES = 256 * 2**20
"""Sources up to this size are checked by digest before training, larger ones by the size of every shard."""


def examine(config: Config, run: RunDir, world: World, lock: list[int]) -> dict[str, Any]:
    """On rank 0: every check that needs the data or the disk; takes the lock. What the others must know.

    With the lock the run is this start's: what others have left unfinished goes, before it is seen what they finished.
    """
    plan_batch(config, world.size)
    sources = open_training(config.data)
    vocabulary = sources[0].vocabulary
    check_vocabulary(config, vocabulary, where=", ".join(index.source for index in sources))
    class_rows(config.model.class_embeddings, vocabulary)
    for index in sources:
        verify_shards(index, checksums=sum(shard.size for shard in index.shards) <= _CHECKSUM_BYTES)
    validation = open_validation(config.data, vocabulary)
    if validation is not None:
        verify_shards(validation, checksums=False)
    _refuse_missing_ranks(config, world)
    refuse_foreign(run)
    taken = take_lock(run, lock)
    with disk_errors(run.path):
        swept = sweep(run, taken.fence)
    notes = [*taken.notes, *(f"removed the unfinished {name}" for name in swept)]
    checkpoint, damaged = newest_sound_checkpoint(run)
    if damaged and checkpoint is None:
        raise UserError(
            f"no checkpoint of this run is sound: {' '.join(damaged.values())}",
            where=str(run.path),
            remedy="Restore one, or start a new run_dir (train.init_from can take weights from elsewhere).",
        )
    source, lent = None, None
    if checkpoint is not None:
        check_same_vocabulary(
            checkpoint, vocabulary, f"start a new run_dir with train.init_from={run.path} --reinit-head."
        )
    elif config.train.init_from:
        source = resolve_checkpoint(config.train.init_from)[1]
        lent = lent_classes(config, source, vocabulary)
    merges, texts = _merges(run, sources, validation, checkpoint)
    return {
        "checkpoint": str(checkpoint) if checkpoint else None,
        "init_from": str(source) if source else None,
        "token": taken.fence.token,
        "start": taken.start,
        "class_images": class_images(sources),
        "texts": texts | ({LENT: lent.text()} if lent is not None else {}),
        "damaged": [str(folder) for folder in damaged],
        "notes": [
            *notes,
            *damaged.values(),
            *_few_queries(config, sources),
            *_unseen(config, world, validation),
            *merges,
        ],
    }


def _merges(
    run: RunDir, sources: Sequence[Index], validation: Index | None, checkpoint: Path | None
) -> tuple[list[str], dict[str, str]]:
    """What a start says of a unified vocabulary, and the file of the run that has all of it."""
    seen = way_note(validation, "validation") if validation is not None else None
    unified = merges_of(sources)
    if unified is None:
        return list(filter(None, [seen])), {}
    changed = what_changed(Vocabulary.load(checkpoint / VOCABULARY), unified.vocabulary) if checkpoint else None
    lines = describe(unified, whole=str(run.path / MERGES))
    return [*lines, *filter(None, [changed, seen])], {MERGES: whole_text(unified)}


def settle(run: RunDir, fence: Fence, settings: dict[str, str], damaged: list[Path]) -> list[str]:
    """On rank 0, once nothing can be refused any more: clean up and write what the run is. Notes for the person.

    Raises FencedError where another start has taken the run over.
    """
    fence.check()
    with disk_errors(run.path):
        run.checkpoints.mkdir(exist_ok=True)
        old = sweep_aside(run, fence)  # before those of this start: they stay for a look at them
        set_aside(run, fence, damaged, DAMAGED)
    unmoved = point_latest(run, fence)
    for name, text in settings.items():
        fence.write(run.path / name, text)
    return [
        *(f"removed {name}, which an earlier start set aside; the newest one is kept" for name in old),
        *([unmoved] if unmoved else []),
        *(f"{name} has no manifest, so it is no checkpoint; it is left alone" for name in without_manifest(run)),
    ]


def refuse_unshared(run: RunDir, fence: Fence, world: World) -> None:
    """On every rank: UserError where this node does not see the run directory in which rank 0 took the lock.

    Else every rank would write its part into a folder of its own node, and a save would fail or be short of files.
    """
    if world.first:
        fence.check()  # where another start has taken over, it is not for want of a shared file system
    deadline = time.monotonic() + _SHARED_SECONDS
    while not _sees(fence):
        if time.monotonic() > deadline:
            raise UserError(
                f"rank {world.rank} on {socket.gethostname()} does not see what rank 0 wrote into the run directory",
                where=str(run.path),
                remedy="Choose a run_dir on a file system that all nodes share.",
            )
        time.sleep(0.1)


def _sees(fence: Fence) -> bool:
    try:
        return fence.token in fence.read().split()
    except FaultError:
        return False


def refuse_foreign(run: RunDir) -> None:
    """A folder that holds somebody else's configuration or checkpoints is not overwritten."""
    ours = run.metrics.exists() or (run.path / LOCK).exists() or committed_checkpoints(run)
    if not ours and (run.config.exists() or run.checkpoints.exists()):
        raise UserError(
            "the run directory holds files that no run of this program left there (config.yaml or checkpoints/)",
            where=str(run.path),
            remedy="Choose another run_dir.",
        )


def _refuse_missing_ranks(config: Config, world: World) -> None:
    """A rank that is to be profiled and is not there would be waited for in vain by the person who named it."""
    missing = [rank for rank in config.train.profile_ranks if rank >= world.size]
    if config.train.profile and missing:
        raise UserError(
            f"train.profile_ranks names rank {missing[0]}, and there are {world.size} ranks",
            where="configuration",
            remedy=f"Take ranks from 0 to {world.size - 1}.",
        )


def _unseen(config: Config, world: World, validation: Index | None) -> list[str]:
    """Sentences on what will not be looked at, which is legal."""
    notes, train = [], config.train
    if validation is None and (config.eval.every_steps or config.eval.metrics_every_steps):
        notes.append("no validation source (data.val): no validation loss and no evaluation on the way")
    if world.size > 1 and train.hang_timeout >= train.collective_timeout:
        notes.append(
            f"train.hang_timeout = {train.hang_timeout} is not below train.collective_timeout = "
            f"{train.collective_timeout}: where a rank hangs, the others give up before its stacks are written"
        )
    return notes


def _few_queries(config: Config, sources: Sequence[Index]) -> list[str]:
    """A sentence where some images of the sources have more segments than there are queries, which is legal."""
    if config.model.kind != "mask_classification":
        return []
    queries = config.model.decoder.queries
    above = most = images = 0
    for index in sources:
        for segments in segment_counts(index, config.data.task):
            above, most = above + int((segments > queries).sum()), max(most, int(segments.max()))
            images += len(segments)
    if most <= queries:
        return []
    share = above / images
    have = "may have" if config.data.task == "instance" else "have"
    shown = f"{share:.1%}" if share >= 0.001 else f"{above:,}"
    return [
        f"{shown} of the images {have} more segments than the {queries} queries; the surplus stays unmatched "
        f"(most: {most}; raise model.decoder.queries)"
    ]


def segment_counts(index: Index, task: str, images: int = 2**20) -> Iterator[np.ndarray]:
    """Segments of each image of a source as `task` has them, int64, so many `images` at a time; crowds included.

    For instance an upper bound: the segments that are left when each stuff class of the image takes one; and where
    labels are mapped, which may leave segments out or join them. In pieces, since the counts of 100 million images
    take 800 MB.
    """
    column, things = index.column("segments"), np.array(index.vocabulary.things, dtype=bool)
    for first in range(0, index.samples, images):
        end = min(first + images, index.samples)
        if task == "panoptic":
            yield column[first:end].astype(np.int64)
            continue
        offsets, labels = index.class_lists(first, end)
        if task == "semantic":
            yield np.diff(offsets)
            continue
        before = np.concatenate(([0], np.cumsum(~things[labels])))
        yield column[first:end].astype(np.int64) - (before[offsets[1:]] - before[offsets[:-1]])


def check_same_vocabulary(source: Path, vocabulary: Vocabulary, other_way: str) -> None:
    """UserError unless a checkpoint has the classes of the training sources, in their order."""
    saved = Vocabulary.load(source / VOCABULARY)
    if saved.digest == vocabulary.digest:
        return
    unified = bool(saved.members or vocabulary.members)
    if unified and sorted(zip(saved.names, saved.things, strict=True)) == sorted(
        zip(vocabulary.names, vocabulary.things, strict=True)
    ):
        raise UserError(
            f"the checkpoint was trained on the same {len(saved):,} classes in another order: the order of the sources "
            "gives the order of the labels",
            where=str(source),
            remedy=f"Name the sources in the order of the run, new ones last, or {other_way}",
        )
    changed = [a for a, b in zip(saved.names, vocabulary.names, strict=False) if a != b]
    raise UserError(
        f"the checkpoint was trained on vocabulary {saved.name!r} ({len(saved)} classes), the "
        f"{'sources together have' if unified else 'source has'} "
        f"{vocabulary.name!r} ({len(vocabulary)} classes)"
        + (f"; the first class that differs is {changed[0]!r}" if changed else "")
        + (_lost_and_new(saved, vocabulary) if unified else ""),
        where=str(source),
        remedy=(
            "Sources, tables and maps may change in a run as long as the unified classes stay the same: take back "
            f"what changed, or {other_way}"
            if unified
            else f"Pack the source with the checkpoint's vocabulary, or {other_way}"
        ),
    )


def _lost_and_new(saved: Vocabulary, vocabulary: Vocabulary) -> str:
    lost, new = (set(a.names) - set(b.names) for a, b in ((saved, vocabulary), (vocabulary, saved)))
    return f"; {len(lost):,} of its classes are gone, {len(new):,} are new"
