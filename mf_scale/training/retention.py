"""Which checkpoints stay: the newest, those at multiples of a step, and the one of the best validation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from mf_scale.config.schema import CheckpointConfig
from mf_scale.rundir import MANIFEST, RunDir, checkpoint_damage, checkpoint_step, committed_checkpoints


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
    run: RunDir, config: CheckpointConfig, best: int | None, sound: Collection[int], between: Callable[[], None]
) -> list[Path]:
    """Remove the surplus, oldest first, unless none of those that stay is sound; what was removed. Rank 0 only.

    `sound`: steps whose files this process has written or verified itself; others are read through where it comes to
    that. `between` is called in the middle of each removal.
    """
    committed = {checkpoint_step(folder): folder for folder in committed_checkpoints(run)}
    gone = surplus(committed, config, best)
    stay = [step for step in committed if step not in gone]
    # Those known to be sound come first: their files are looked at, but not read.
    stay.sort(key=lambda step: (step not in sound, -step))
    if gone and not any(checkpoint_damage(committed[s], digests=s not in sound) is None for s in stay):
        return []
    for step in gone:
        # Without its manifest it is no checkpoint any more, even if the removal is interrupted here.
        (committed[step] / MANIFEST).unlink(missing_ok=True)
        between()
        shutil.rmtree(committed[step], ignore_errors=True)
    return [committed[step] for step in gone]
