"""A checkpoint of a given size, saved in three ways on this machine: what the training pays, what it takes in all."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.fragments import partition_file, tensor_key
from mf_scale.rundir import FORMAT, MANIFEST, WEIGHTS, RunDir, disk_errors, file_digest, write_atomically
from mf_scale.training.checkpoint import begin, commit, write_files
from mf_scale.training.fence import Fence
from mf_scale.training.lock import let_go, take_lock
from mf_scale.training.snapshot import FileBytes, FileContents, Snapshot, live_files
from mf_scale.training.writer import Writer

_SIDE = 1024
"""Of the square parameters that the model is made of."""
_TICK_SECONDS = 0.001


@dataclass(frozen=True)
class Timing:
    """One save, in seconds."""

    stall: float
    """In which the training stands still."""
    seconds: float
    """Until the checkpoint is committed."""
    hold: float
    """The longest that another thread waited for the interpreter while files were written."""


def bench_save(millions: int, *, repeats: int, folder: str | None, json_file: str | None) -> str:
    """Save weights and moments of `millions` of parameters, alternating between the ways; a table to read.

    The files go into a folder inside `folder` (none: the system's temporary one), which is removed. Medians of
    `repeats` rounds after one that warms up. UserError where the disk refuses.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = Path(tempfile.mkdtemp(prefix="mf-scale-bench-", dir=_existing(folder)))
    lock: list[int] = []
    try:
        fence = take_lock(RunDir(where), lock).fence
        contents, snapshot = _contents(millions, device), Snapshot(device)
        ways: dict[str, Callable[[int], Timing]] = {
            "asynchronous": lambda step: _save(RunDir(where), fence, step, partial(snapshot.take, contents)),
            "synchronous": lambda step: _save(RunDir(where), fence, step, partial(live_files, contents), wait=True),
            "save_file": lambda step: _save_with_safetensors(RunDir(where), step, contents),
        }
        snapshot.prepare(contents)
        timings: dict[str, list[Timing]] = {name: [] for name in ways}
        for number in range(1 + repeats):
            for place, (name, save) in enumerate(ways.items()):
                timing = save(number * len(ways) + place)
                shutil.rmtree(RunDir(where).checkpoints)
                if number:
                    timings[name].append(timing)
    finally:
        let_go(lock)
        shutil.rmtree(where, ignore_errors=True)
    size = sum(tensor.nbytes for content in contents for tensor in content.tensors.values())
    medians = {name: _median(several) for name, several in timings.items()}
    if json_file:
        summary = {"bytes": size, "device": device.type, "repeats": repeats}
        results = {name: vars(timing) for name, timing in medians.items()}
        with disk_errors(Path(json_file)):
            Path(json_file).write_text(json.dumps({**summary, "results": results}, indent=1), encoding="utf-8")
    return _table(medians, size, device)


def _existing(folder: str | None) -> str | None:
    if folder is not None and not Path(folder).is_dir():
        raise UserError("there is no such folder", where=folder, remedy="Name one on the disk to be measured.")
    return folder


def _contents(millions: int, device: torch.device) -> list[FileContents]:
    names = [f"layer.{number}.weight" for number in range(max(1, round(millions * 1e6 / _SIDE**2)))]
    weights = {name: torch.randn(_SIDE, _SIDE, device=device) for name in names}
    moments = {
        tensor_key(kind, 0, name): torch.randn(_SIDE**2, device=device)
        for kind in ("exp_avg", "exp_avg_sq")
        for name in names
    }
    return [FileContents(WEIGHTS, weights, {}), FileContents(partition_file(0, 1), moments, {})]


def _save(run: RunDir, fence: Fence, step: int, files: Callable[[], list[FileBytes]], *, wait: bool = False) -> Timing:
    """As the trainer does. The commit is paid by the training too, once the files are written."""
    world, writer, began = World(0, 1, 0), Writer("bench"), time.perf_counter()
    copied = files()
    problem = begin(run, fence, step, world, None)
    if problem is None:
        writer.start(partial(write_files, run, fence, step, 0, copied, {}))
    started = time.perf_counter()
    hold = _longest_hold(lambda: problem is None and not writer.ended)
    written = time.perf_counter()
    problem = problem or commit(run, fence, step, world, writer.wait()).problem
    ended = time.perf_counter()
    if problem is not None:
        raise UserError(f"the checkpoint could not be written: {problem}", where=str(run.path))
    stall = ended - began if wait else (started - began) + (ended - written)
    return Timing(stall, ended - began, hold)


def _save_with_safetensors(run: RunDir, step: int, contents: list[FileContents]) -> Timing:
    """The library's own `save_file`, then a second reading for the digests."""
    from safetensors.torch import save_file

    folder, files, began = run.checkpoint(step), {}, time.perf_counter()

    def write() -> None:
        folder.mkdir(parents=True)
        for content in contents:
            file = folder / content.name
            save_file({name: _on_host(tensor) for name, tensor in content.tensors.items()}, file, content.metadata)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            files[file.name] = {"size": file.stat().st_size, "sha256": file_digest(file)}
        write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}))

    writer = Writer("bench")
    writer.start(write)
    hold = _longest_hold(lambda: not writer.ended)
    problem, seconds = writer.wait().problem, time.perf_counter() - began
    if problem is not None:
        raise UserError(f"the checkpoint could not be written: {problem}", where=str(run.path))
    return Timing(seconds, seconds, hold)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _longest_hold(going_on: Callable[[], bool]) -> float:
    longest = 0.0
    while going_on():
        before = time.perf_counter()
        time.sleep(_TICK_SECONDS)
        longest = max(longest, time.perf_counter() - before - _TICK_SECONDS)
    return longest


def _median(timings: list[Timing]) -> Timing:
    return Timing(*(statistics.median(getattr(t, name) for t in timings) for name in ("stall", "seconds", "hold")))


def _table(medians: dict[str, Timing], size: int, device: torch.device) -> str:
    whole = medians["synchronous"].seconds
    rows: list[tuple[Any, ...]] = [
        (name, f"{t.stall:.3f}", f"{t.seconds:.3f}", f"{size / t.seconds / 1e9:.2f}", f"{1000 * t.hold:.0f}")
        for name, t in medians.items()
    ]
    lines = [f"a checkpoint of {size / 1e6:,.0f} MB on {device.type}, one rank, medians"]
    titles = ("", "stall s", "in all s", "GB/s", "longest hold ms", "stall of synchronous")
    for row in [titles, *((*row, f"{medians[row[0]].stall / whole:.1%}") for row in rows)]:
        lines.append(
            f"{row[0]:<14}"
            + "".join(f"{cell:>{max(10, len(title) + 2)}}" for cell, title in zip(row[1:], titles[1:], strict=True))
        )
    lines.append("hold: the longest that another thread waited for the interpreter; save_file: safetensors' own writer")
    return "\n".join(lines)
