"""Which checkpoints stay: the newest, those at multiples of a step, and the one of the best validation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from mf_scale.config.schema import CheckpointConfig
from mf_scale.errors import UserError
from mf_scale.rundir import STATE, RunDir, checkpoint_damage, checkpoint_step, committed_checkpoints, read_json
from mf_scale.training.fence import Fence
from mf_scale.training.leftovers import take_out


def surplus(steps: Collection[int], config: CheckpointConfig, best: int | None) -> list[int]:
    """The steps of checkpoints that may go, oldest first. `best`: the step of the lowest validation loss, if any."""
    newest = sorted(steps, reverse=True)[: config.keep_last]
    return sorted(
        step
        for step in steps
        if step not in newest
        and not (config.keep_every and step % config.keep_every == 0)
        and not (config.keep_best and step == best)
    )


def retain(
    run: RunDir, fence: Fence, config: CheckpointConfig, sound: Collection[int], between: Callable[[], None]
) -> list[Path]:
    """Remove the surplus, oldest first, unless none of those that stay is sound; what was removed. Rank 0 only.

    A checkpoint that is a link is not ours to remove.

    `sound`: steps whose files this process has written or verified itself; others are read through where it comes to
    that. `between` is called in the middle of each removal. FencedError where another start has taken the run over.
    """
    committed = {checkpoint_step(folder): folder for folder in committed_checkpoints(run)}
    best = best_committed(committed) if config.keep_best else None
    gone = [step for step in surplus(committed, config, best) if not committed[step].is_symlink()]
    stay = [step for step in committed if step not in gone]
    # Those known to be sound come first: their files are looked at, but not read.
    stay.sort(key=lambda step: (step not in sound, -step))
    if gone and not any(checkpoint_damage(committed[s], digests=s not in sound) is None for s in stay):
        return []
    for step in gone:
        # There it is no checkpoint any more, even if the removal is interrupted here.
        leaving = take_out(run, fence, committed[step])
        between()
        shutil.rmtree(leaving.parent, ignore_errors=True)
    return [committed[step] for step in gone]


def best_committed(committed: Mapping[int, Path]) -> int | None:
    """The step of the checkpoint with the best validation so far, of those that are there.

    Losses that count as best only fall, so it is the newest one that was the best when it was written. What the newest
    state calls the best may never have been committed: its save failed, or the process was killed before.
    """
    for step in sorted(committed, reverse=True):
        with suppress(UserError, LookupError, TypeError, ValueError):
            best = read_json(committed[step] / STATE)["best"]
            if best is not None and int(best[0]) == step:
                return step
    return None
