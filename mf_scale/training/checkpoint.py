"""Checkpoints as commits: all ranks write into a temporary folder, rank 0 writes the manifest last and renames.

Whatever is killed at whatever moment, a folder named step-N is whole, and a temporary one is never read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.rundir import (
    CONFIG,
    MANIFEST,
    STATE,
    VOCABULARY,
    WEIGHTS,
    RunDir,
    checkpoint_damage,
    committed_checkpoints,
    disk_errors,
    file_digest,
    is_checkpoint_name,
    write_atomically,
)
from mf_scale.training.moments import moments_file, write_moments
from mf_scale.training.state import TrainState

_TEMPORARY = ".writing-"


def save(run: RunDir, engine: Engine, state: TrainState, world: World, settings: dict[str, str]) -> str | None:
    """Write and commit a checkpoint; all ranks call it. Returns None, or why nothing was committed (on every rank).

    `settings` are the texts of config.yaml and vocabulary.json by file name. A failure (a full disk) leaves the
    earlier checkpoints and the run untouched.
    """
    final = run.checkpoint(state.step)
    temporary = run.checkpoints / f"{_TEMPORARY}{final.name}"
    problem = comm.broadcast_object(_attempt(lambda: _fresh_folder(temporary)) if world.first else None)
    if problem is None:
        problem = _write_files(temporary, engine, state, world, settings)
    if problem is None:
        problem = comm.broadcast_object(_attempt(lambda: _commit(temporary, final)) if world.first else None)
    if problem is not None and world.first:
        shutil.rmtree(temporary, ignore_errors=True)
    return None if problem is None else str(problem)


def _write_files(folder: Path, engine: Engine, state: TrainState, world: World, settings: dict[str, str]) -> str | None:
    """This rank's files, then every rank's sizes and digests in the manifest; the first problem of any rank."""
    written: dict[str, Any] = {}

    def write() -> None:
        file = folder / moments_file(world.rank, world.size)
        write_moments(engine.owned_fragments(), file)
        files = [file]
        if world.first:
            files += _write_shared(folder, engine.module, state, settings)
        written.update({f.name: _flushed_entry(f) for f in files})

    report = {"rank": world.rank, "problem": _attempt(write), "files": written}
    reports = comm.gather_objects(report)
    problem = None
    if reports is not None:
        problem = next((f"rank {r['rank']}: {r['problem']}" for r in reports if r["problem"]), None)
        if problem is None:
            files = {name: entry for r in reports for name, entry in r["files"].items()}
            manifest = {"format": 1, "step": state.step, "world": world.size, "files": files}
            problem = _attempt(lambda: write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1)))
    answer: str | None = comm.broadcast_object(problem)
    return answer


def _write_shared(folder: Path, model: nn.Module, state: TrainState, settings: dict[str, str]) -> list[Path]:
    from safetensors.torch import save_file

    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    texts = {STATE: json.dumps(state.to_dict(), indent=1), **{name: settings[name] for name in (CONFIG, VOCABULARY)}}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / WEIGHTS, *(folder / name for name in texts)]


def _flushed_entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"size": file.stat().st_size, "sha256": file_digest(file)}


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _commit(temporary: Path, final: Path) -> None:
    _fsync_folder(temporary)
    # A run that resumed from an older checkpoint may reach this step again: the new one takes the old one's place.
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _fsync_folder(final.parent)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _attempt(action: Callable[[], Any]) -> str | None:
    """Run a disk action; its problem as a sentence, or None."""
    try:
        with disk_errors(Path("checkpoint")):
            action()
    except UserError as error:
        return f"{error.what}. {error.remedy}"
    except Exception as error:
        # safetensors says a full disk in an exception of its own, with the system's number in the text.
        number = re.search(r"os error (\d+)", str(error))
        return _attempt(partial(_fail, int(number[1]))) if number else f"{type(error).__name__}: {error}"
    return None


def _fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def retain(run: RunDir, keep: int) -> list[Path]:
    """Remove all but the newest `keep` committed checkpoints, oldest first, never the only sound one. Rank 0 only."""
    committed = committed_checkpoints(run)
    if not any(checkpoint_damage(folder, digests=False) is None for folder in committed[:keep]):
        return []
    surplus = committed[keep:]
    for folder in reversed(surplus):
        # Without its manifest it is no checkpoint any more, even if the removal is interrupted here.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return surplus


def sweep(run: RunDir) -> list[str]:
    """Remove what interrupted saves and removals left; the names. Rank 0 only, before training."""
    folders = [f for f in run.checkpoints.iterdir() if f.is_dir()] if run.checkpoints.is_dir() else []
    removed = [f for f in folders if _is_leftover(f)]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in removed]


def _is_leftover(folder: Path) -> bool:
    if folder.name.startswith(_TEMPORARY):
        return is_checkpoint_name(folder.name.removeprefix(_TEMPORARY))
    return is_checkpoint_name(folder.name) and not (folder / MANIFEST).is_file()


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints that a start walked back from; one that becomes readable again must not come back."""
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
