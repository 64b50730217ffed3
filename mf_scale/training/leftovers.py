"""What interrupted saves and removals leave, and checkpoints that are taken away or set aside. Rank 0 only.

Another start may take the run over at any moment, so each function first looks what is there, then checks the fence,
then acts on what it saw: that was there before, so it is never the other start's. And a checkpoint is moved by way of
a folder that carries the token of this start, which the other one has swept away before it looks what is there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mf_scale.errors import UserError
from mf_scale.rundir import (
    CONFIG,
    LATEST,
    MANIFEST,
    VOCABULARY,
    WRITING,
    RunDir,
    checkpoint_step,
    is_checkpoint_name,
    replaced_by,
)
from mf_scale.training.fence import Fence

REMOVING = ".removing-"
"""What the name of a folder begins with into which a checkpoint is moved to be removed: it is none any more there."""
DAMAGED, ABANDONED = "damaged", "abandoned"
"""What the names of checkpoints end with that are set aside: one that a start walked back from, and one that has seen
a spike."""
_ROUNDS = 10
"""What an older start renames while it is swept up is swept up in the next round."""


def sweep(run: RunDir, fence: Fence) -> list[str]:
    """Remove what interrupted saves, removals and writes of small files left; the names.

    A start calls it when it has taken the lock, before it looks which checkpoints there are. A step-N that lost its
    manifest is left alone: somebody may still want its files.
    """
    removed: list[str] = []
    for _ in range(_ROUNDS):
        found = [folder for folder in _folders(run) if _is_leftover(folder, fence)]
        fence.check()
        if not found:
            break
        for folder in found:
            prefix = WRITING if folder.name.startswith(WRITING) else REMOVING
            mine = folder.with_name(f"{prefix}{fence.token}-{folder.name.removeprefix(prefix)}")
            with suppress(FileNotFoundError):  # it became a checkpoint just now
                folder.rename(mine)
                discard(mine)
                removed.append(folder.name)
    files = [
        file
        for place, names in ((run.checkpoints, (LATEST,)), (run.path, (CONFIG, VOCABULARY)))
        for file in (place.iterdir() if place.is_dir() else ())
        if any(re.fullmatch(rf"\.{re.escape(name)}\.\w+", file.name) for name in names)
    ]
    fence.check()
    for file in files:
        file.unlink(missing_ok=True)
    return [*removed, *(file.name for file in files)]


def discard(folder: Path) -> None:
    """Remove a folder that was to become a checkpoint, or to be removed; OSError where that cannot be.

    The checkpoint that it was just about to replace gets its name back.
    """
    kept = replaced_by(folder)
    final = folder.with_name(kept.name)
    if folder.name.startswith(WRITING) and (kept / MANIFEST).is_file() and not final.exists():
        kept.rename(final)
    shutil.rmtree(folder, ignore_errors=True)


def take_out(run: RunDir, fence: Fence, folder: Path) -> Path:
    """Move a checkpoint into a folder of this start's own, where it is none any more; where it lies there.

    Raises FencedError, or OSError.
    """
    place = run.checkpoints / f"{REMOVING}{fence.token}-{folder.name}"
    fence.check()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        fence.check()  # once more: a start that takes over from now on sweeps the folder away
        return folder.rename(place / folder.name)
    except (UserError, OSError):
        with suppress(OSError):
            place.rmdir()
        raise


def set_aside(run: RunDir, fence: Fence, folders: Iterable[Path], why: str) -> None:
    """Rename checkpoints that are never to be taken again, even if they become readable: DAMAGED or ABANDONED ones."""
    for folder in folders:
        aside = run.checkpoints / f"{folder.name}.{why}"
        taken = take_out(run, fence, folder)
        shutil.rmtree(aside, ignore_errors=True)
        taken.rename(aside)
        taken.parent.rmdir()


def sweep_aside(run: RunDir, fence: Fence) -> list[str]:
    """Remove all but the newest damaged and the newest abandoned checkpoint that earlier starts set aside; names."""
    old: list[Path] = []
    for why in (DAMAGED, ABANDONED):
        aside = [f for f in _folders(run) if f.suffix == f".{why}" and is_checkpoint_name(f.stem)]
        old += sorted(aside, key=lambda folder: checkpoint_step(Path(folder.stem)))[:-1]
    fence.check()
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in old]


def without_manifest(run: RunDir) -> list[str]:
    """Names of step-N folders that are no checkpoints, since their manifest is gone."""
    return [f.name for f in _folders(run) if is_checkpoint_name(f.name) and not (f / MANIFEST).is_file()]


def _folders(run: RunDir) -> list[Path]:
    """The folders beside the checkpoints; what a link leads to is somebody's own."""
    inside = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
    return sorted(folder for folder in inside if folder.is_dir() and not folder.is_symlink())


def _is_leftover(folder: Path, fence: Fence) -> bool:
    """A temporary folder of another start."""
    for prefix in (WRITING, REMOVING):
        if folder.name.startswith(prefix) and not folder.name.startswith(f"{prefix}{fence.token}-"):
            return is_checkpoint_name(replaced_by(folder).name)
    return False
