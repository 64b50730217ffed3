"""Checkpoints as commits: all ranks write into a temporary folder, rank 0 writes the manifest last and renames.

Whatever is killed at whatever moment, a folder named step-N is whole, and a temporary one is never read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mf_scale import faults
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.rundir import (
    CONFIG,
    FORMAT,
    LATEST,
    MANIFEST,
    REPLACED,
    VOCABULARY,
    RunDir,
    checkpoint_step,
    committed_checkpoints,
    fsync_folder,
    is_checkpoint_name,
    write_atomically,
)
from mf_scale.training.snapshot import FileBytes
from mf_scale.training.tensor_file import write_file
from mf_scale.training.writer import Outcome, attempt

REMOVING = ".removing-"
"""What the name of a checkpoint begins with while its files are removed: it is none any more, and no other is."""
DAMAGED, ABANDONED = "damaged", "abandoned"
"""What the names of checkpoints end with that are set aside: one that a start walked back from, and one that has seen
a spike."""
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Commit:
    """How a commit ended, known on every rank."""

    bytes: int
    """Of all files; 0 where it failed."""
    problem: str | None
    """Why nothing was committed."""


def begin(run: RunDir, step: int, world: World, problem: str | None) -> str | None:
    """Make the empty temporary folder, unless some rank has a `problem`; all call it. Returns None, or why not."""
    problems = comm.gather_objects(problem)
    if problems is not None:
        problem = _first_problem(problems) or attempt(lambda: _fresh_folder(_temporary(run, step))).problem
    answer: str | None = comm.broadcast_object(problem)
    return answer


def write_files(
    run: RunDir, step: int, rank: int, files: Iterable[FileBytes], texts: Mapping[str, str]
) -> dict[str, Any]:
    """Write this rank's files into the temporary folder; name -> size and digest. No collective: it may run behind."""
    folder = _temporary(run, step)
    between = partial(faults.reach, "save.part", rank=rank, step=step)
    written = {file.name: write_file(folder / file.name, file.pieces, between) for file in files}
    written |= {name: write_file(folder / name, [memoryview(text.encode())]) for name, text in texts.items()}
    faults.reach("save.written", rank=rank, step=step)
    return written


def commit(run: RunDir, step: int, world: World, written: Outcome) -> Commit:
    """Make a checkpoint of what the ranks wrote; all call it with the outcome of their `write_files`.

    A failure of any rank (a full disk) removes the temporary folder and leaves the earlier checkpoints as they are.
    """
    reports = comm.gather_objects({"problem": written.problem, "files": written.result})
    answer: list[Any] = [0, None]
    if reports is not None:
        problem = _first_problem([report["problem"] for report in reports])
        if problem is None:
            files = {name: entry for report in reports for name, entry in report["files"].items()}
            problem = attempt(lambda: _commit(run, step, world, files)).problem
            answer[0] = sum(entry["size"] for entry in files.values())
        if problem is not None:
            shutil.rmtree(_temporary(run, step), ignore_errors=True)
            answer = [0, problem]
    return Commit(*comm.broadcast_object(answer))


def _first_problem(problems: list[str | None]) -> str | None:
    return next((f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem), None)


def _commit(run: RunDir, step: int, world: World, files: dict[str, Any]) -> None:
    temporary, final = _temporary(run, step), run.checkpoint(step)
    faults.reach("save.manifest", rank=world.rank, step=step)
    manifest = {"format": FORMAT, "step": step, "world": world.size, "files": files}
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
    fsync_folder(temporary)
    faults.reach("save.rename", rank=world.rank, step=step)
    _take_name(temporary, final)
    with suppress(OSError):  # it has its name: a failure from here on must not call it uncommitted
        fsync_folder(final.parent)
    faults.reach("save.renamed", rank=world.rank, step=step)


def _take_name(temporary: Path, final: Path) -> None:
    """A run that resumed from an older checkpoint may reach a step again: the new one takes the old one's place.

    A folder cannot be renamed over a full one, so the old one stands aside for a moment, where it still counts.
    """
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def point_latest(run: RunDir) -> str | None:
    """Let `checkpoints/latest` lead to the newest checkpoint; why it could not, for a file system without links."""
    committed = committed_checkpoints(run)
    link = run.checkpoints / LATEST
    fresh = link.with_name(f".{LATEST}.{os.getpid()}")
    try:
        if not committed:
            link.unlink(missing_ok=True)
            return None
        if link.is_symlink() and link.readlink() == Path(committed[0].name):
            return None
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(committed[0].name)
        fresh.replace(link)
    except OSError as error:
        return f"{link} could not be moved ({error.strerror or error}), which matters to people only"
    return None


def sweep(run: RunDir) -> list[str]:
    """Remove what interrupted saves, removals and writes of small files left; the names. Rank 0 only, before training.

    A step-N that lost its manifest is left alone: somebody may still want its files.
    """
    removed = []
    for folder in _folders(run):
        name = folder.name.removeprefix(REPLACED)
        if name != folder.name and is_checkpoint_name(name) and not (folder.with_name(name) / MANIFEST).is_file():
            shutil.rmtree(folder.with_name(name), ignore_errors=True)
            folder.rename(folder.with_name(name))
        elif _is_leftover(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    for place, names in ((run.checkpoints, (LATEST,)), (run.path, (CONFIG, VOCABULARY))):
        for file in place.iterdir() if place.is_dir() else ():
            if any(re.fullmatch(rf"\.{re.escape(name)}\.\d+", file.name) for name in names):
                file.unlink(missing_ok=True)
                removed.append(file.name)
    point_latest(run)
    return removed


def without_manifest(run: RunDir) -> list[str]:
    """Names of step-N folders that are no checkpoints, since their manifest is gone."""
    return [f.name for f in _folders(run) if is_checkpoint_name(f.name) and not (f / MANIFEST).is_file()]


def _folders(run: RunDir) -> list[Path]:
    """The folders beside the checkpoints; what a link leads to is somebody's own."""
    inside = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
    return sorted(folder for folder in inside if folder.is_dir() and not folder.is_symlink())


def _is_leftover(folder: Path) -> bool:
    return any(
        folder.name.startswith(prefix) and is_checkpoint_name(folder.name.removeprefix(prefix))
        for prefix in (_TEMPORARY, REPLACED, REMOVING)
    )


def sweep_aside(run: RunDir) -> list[str]:
    """Remove all but the newest damaged and the newest abandoned checkpoint that earlier starts set aside; names."""
    removed = []
    for why in (DAMAGED, ABANDONED):
        aside = [f for f in _folders(run) if f.suffix == f".{why}" and is_checkpoint_name(f.stem)]
        for folder in sorted(aside, key=lambda folder: checkpoint_step(Path(folder.stem)))[:-1]:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    return removed


def set_aside(folders: Iterable[Path], why: str) -> None:
    """Rename checkpoints that are never to be taken again, even if they become readable: DAMAGED or ABANDONED ones."""
    for folder in folders:
        aside = folder.with_name(f"{folder.name.removeprefix(REPLACED)}.{why}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def _temporary(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"{_TEMPORARY}{run.checkpoint(step).name}"


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
