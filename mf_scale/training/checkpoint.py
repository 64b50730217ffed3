"""Checkpoints as commits: all ranks write into a temporary folder, rank 0 writes the manifest last and renames.

Whatever is killed at whatever moment, a folder named step-N is whole, and a temporary one is never read. Its name
carries the token of the start that writes it: once a new start has taken the run over, it sweeps such folders away
before it looks which checkpoints there are. So the rename of one that was cut off came before, or fails.
"""

from __future__ import annotations

import json
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
from mf_scale.errors import UserError
from mf_scale.rundir import (
    FORMAT,
    LATEST,
    MANIFEST,
    WRITING,
    RunDir,
    committed_checkpoints,
    fsync_folder,
    replaced_by,
    write_atomically,
)
from mf_scale.training.fence import Fence
from mf_scale.training.leftovers import discard
from mf_scale.training.snapshot import FileBytes
from mf_scale.training.tensor_file import write_file
from mf_scale.training.writer import Outcome, attempt


@dataclass(frozen=True)
class Commit:
    """How a commit ended, known on every rank."""

    bytes: int
    """Of all files; 0 where it failed."""
    problem: str | None
    """Why nothing was committed."""


def begin(run: RunDir, fence: Fence, step: int, world: World, problem: str | None) -> str | None:
    """Make the empty temporary folder, unless some rank has a `problem`; all call it. Returns None, or why not.

    Where another start has taken the run over, raises FencedError on rank 0 and GuardError on the others.
    """
    problems = comm.gather_objects(problem)
    answer: str | None = comm.on_first_rank(lambda: _begin(run, fence, step, problems or []))
    return answer


def write_files(
    run: RunDir, fence: Fence, step: int, rank: int, files: Iterable[FileBytes], texts: Mapping[str, str]
) -> dict[str, Any]:
    """Write this rank's files into the temporary folder; name -> size and digest. No collective: it may run behind."""
    folder = _temporary(run, fence, step)
    between = partial(faults.reach, "save.part", rank=rank, step=step)
    written = {file.name: write_file(folder / file.name, file.pieces, between) for file in files}
    written |= {name: write_file(folder / name, [memoryview(text.encode())]) for name, text in texts.items()}
    faults.reach("save.written", rank=rank, step=step)
    return written


def commit(run: RunDir, fence: Fence, step: int, world: World, written: Outcome) -> Commit:
    """Make a checkpoint of what the ranks wrote; all call it with the outcome of their `write_files`.

    A failure of any rank (a full disk) removes the temporary folder and leaves the earlier checkpoints as they are.
    Where another start has taken the run over, raises FencedError on rank 0 and GuardError on the others.
    """
    reports = comm.gather_objects({"problem": written.problem, "files": written.result})
    return Commit(*comm.on_first_rank(lambda: _commit(run, fence, step, world, reports or [])))


def _first_problem(problems: list[str | None]) -> str | None:
    return next((f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem), None)


def _begin(run: RunDir, fence: Fence, step: int, problems: list[str | None]) -> str | None:
    fence.check()
    problem, folder = _first_problem(problems), _temporary(run, fence, step)
    if problem is not None:
        return problem
    problem = attempt(lambda: _fresh_folder(folder)).problem
    try:
        fence.check()  # once more: a start that takes over from now on sweeps the folder away
    except UserError:
        with suppress(OSError):
            folder.rmdir()
        raise
    return problem


def _commit(
    run: RunDir, fence: Fence, step: int, world: World, reports: list[dict[str, Any]]
) -> tuple[int, str | None]:
    """Bytes of all files, or 0 and why nothing was committed."""
    problem = _first_problem([report["problem"] for report in reports])
    if problem is None:
        files = {name: entry for report in reports for name, entry in report["files"].items()}
        problem = attempt(lambda: _take_effect(run, fence, step, world, files)).problem
        if problem is None:
            return sum(entry["size"] for entry in files.values()), None
    attempt(lambda: discard(_temporary(run, fence, step)))
    fence.check()  # what fails for a start that was cut off is no matter of the disk
    return 0, problem


def _take_effect(run: RunDir, fence: Fence, step: int, world: World, files: dict[str, Any]) -> None:
    temporary, final = _temporary(run, fence, step), run.checkpoint(step)
    faults.reach("save.manifest", rank=world.rank, step=step)
    fence.check()
    manifest = {"format": FORMAT, "step": step, "world": world.size, "files": files}
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
    fsync_folder(temporary)
    faults.reach("save.rename", rank=world.rank, step=step)
    fence.check()
    faults.reach("save.checked", rank=world.rank, step=step)
    _take_name(temporary, final)
    with suppress(OSError):  # it has its name: a failure from here on must not call it uncommitted
        fsync_folder(final.parent)
    faults.reach("save.renamed", rank=world.rank, step=step)


def _take_name(temporary: Path, final: Path) -> None:
    """A run that resumed from an older checkpoint may reach a step again: the new one takes the old one's place.

    A folder cannot be renamed over a full one, so the old one stands aside for a moment, where it still counts: inside
    of the new one. A start that was cut off has no such folder any more, so it cannot move the checkpoint of another.
    """
    aside = replaced_by(temporary)
    if final.exists():
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        with suppress(OSError):
            aside.rename(final)
        raise
    shutil.rmtree(final / aside.name, ignore_errors=True)


def point_latest(run: RunDir, fence: Fence) -> str | None:
    """Let `checkpoints/latest` lead to the newest checkpoint; why it could not, for a file system without links."""
    committed = committed_checkpoints(run)
    link = run.checkpoints / LATEST
    fresh = link.with_name(f".{LATEST}.{fence.token}")
    try:
        if not committed:
            fence.check()
            link.unlink(missing_ok=True)
            return None
        if link.is_symlink() and link.readlink() == Path(committed[0].name):
            return None
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(committed[0].name)
        fence.check()
        fresh.replace(link)
    except OSError as error:
        return f"{link} could not be moved ({error.strerror or error}), which matters to people only"
    except UserError as error:
        fresh.unlink(missing_ok=True)
        return str(error)
    return None


def _temporary(run: RunDir, fence: Fence, step: int) -> Path:
    return run.checkpoints / f"{WRITING}{fence.token}-{run.checkpoint(step).name}"


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
