"""An unexpected exception of any rank reaches the log once, with the rank named, before the peers see it gone.

The text goes to stderr in one write, each line with the rank in front: where srun mixes the lines of its tasks they
can still be told apart. Where ranks fail alike, at the same place in the code, the first has the traceback and each
other one line: they find each other through files, one a place, in RUN/errors, or in the launcher's folder on one
machine. What a rank leaves there is also the reason that rank 0 tells when its connection to that rank breaks.
No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mf_scale.config.urls import redact
from mf_scale.distributed.env import RENDEZVOUS, World, job_start, world_from_environment
from mf_scale.errors import PARAGRAPHS, StoppedOnRequest, UserError
from mf_scale.rundir import RunDir

FOLDER = "errors"
"""In the run directory."""
KEPT = 50
"""Files of earlier failures that stay in the folder."""
_FRESH_SECONDS = 600.0
_TOLD = "_mf_scale_told"
_LOOK_SECONDS = 0.1
_MOST_LETTERS = 300


def tell_failure(error: BaseException, world: World, folder: Path | None = None) -> None:
    """Say an unexpected error of this rank, once; `folder`: the run directory, where there is one.

    Errors that are said in one paragraph are only noted for the peers, a stop is neither. Never raises.
    """
    if isinstance(error, StoppedOnRequest | KeyboardInterrupt | SystemExit) or getattr(error, _TOLD, False):
        return
    with contextlib.suppress(Exception):
        setattr(error, _TOLD, True)
    with contextlib.suppress(Exception):
        place = _place(folder)
        if isinstance(error, PARAGRAPHS):
            if world.size > 1 and not error.said_by_first_rank and not world.first and place is not None:
                _claim(place, error, world, error.what)
            return
        text = "".join(traceback.format_exception(error))
        first = _claim(place, error, world, text) if place is not None and world.size > 1 else None
        if first is not None:
            text = f"{_in_short(error)} (the traceback is that of {first})\n"
        _write(_named(text, world))


def failure_of_peer(world: World, run: RunDir, seconds: float) -> str | None:
    """What another rank of this start left about its end, waited for `seconds` at most; the earliest; None: nothing."""
    deadline = time.monotonic() + seconds
    while True:
        told = [one for one in _notes(_place(run.path)) if one["rank"] != world.rank]
        if told:
            first = min(told, key=lambda one: float(one["time"]))
            return f"rank {first['rank']} on {first['host']}: {first['short']}"
        if time.monotonic() >= deadline:
            return None
        time.sleep(_LOOK_SECONDS)


def name_rank(text: str, world: World) -> str:
    """The text with the rank in front of it, where it is one of several and not the first."""
    return text if world.first else f"{who(world)}: {text}"


def who(world: World) -> str:
    """A rank, for people: rank 3 on node07."""
    return f"rank {world.rank} on {_host()}"


def watch_threads() -> None:
    """Exceptions that end a thread are said like those that end a rank."""
    threading.excepthook = _in_thread


def _in_thread(told: threading.ExceptHookArgs) -> None:
    if told.exc_type is SystemExit or told.exc_value is None:
        return
    world = World()
    with contextlib.suppress(UserError):
        world = world_from_environment()
    name = told.thread.name if told.thread is not None else "?"
    _write(_named(f"in thread {name}: " + "".join(traceback.format_exception(told.exc_value)), world))


def _named(text: str, world: World) -> str:
    """Each line with the rank in front of it; a process alone needs no name."""
    if world.size == 1:
        return text
    head = who(world)
    return "".join(f"{head}: {line}\n" for line in text.rstrip("\n").split("\n"))


def _write(text: str) -> None:
    """To stderr, behind what is buffered there, in one write; a message may repeat what a request held."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    data = redact(text).encode(errors="replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def _claim(place: Path, error: BaseException, world: World, text: str) -> str | None:
    """Leave word of the error in `place`; who was there first with one of the same place in the code, if anybody."""
    file = place / f"{_start()}-{_where(error)}.json"
    told = {"rank": world.rank, "size": world.size, "host": _host(), "time": time.time(), "short": _in_short(error)}
    mine = file.with_name(f".{file.name}.{_host()}-{os.getpid()}")
    try:
        place.mkdir(exist_ok=True)
        mine.write_text(json.dumps({**told, "text": redact(text)}, indent=1), encoding="utf-8")
        try:
            os.link(mine, file)  # whole when it appears, and the first one stays
        except FileExistsError:
            before = _read(file)
            if before is not None:
                return f"rank {before['rank']} on {before['host']}"
            mine.replace(file)
        except OSError:  # a file system without hard links: all have their say
            mine.replace(file)
        _sweep(place)
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)
    return None


def _notes(place: Path | None) -> list[dict[str, Any]]:
    """What ranks of this start left."""
    files = place.glob(f"{_start()}-*.json") if place is not None else ()
    return [told for file in files if (told := _read(file)) is not None]


def _read(file: Path) -> dict[str, Any] | None:
    """A note; None where there is none, or one of a start long ago that had the same name."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        fresh = time.time() - float(told["time"]) < _FRESH_SECONDS
        return told if fresh and {"rank", "host", "short"} <= set(told) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sweep(place: Path) -> None:
    files = sorted(place.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in files[:-KEPT]:
        file.unlink(missing_ok=True)


def _place(folder: Path | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where ranks leave word: in the run directory once it is one, else in the launcher's folder."""
    if folder is not None and (RunDir(folder).metrics.is_file() or (folder / ".lock").is_file()):
        return folder / FOLDER
    if RENDEZVOUS in environment:
        return Path(environment[RENDEZVOUS]).parent / FOLDER
    return Path(environment["MF_RANKS"], FOLDER) if "MF_RANKS" in environment else None


def _start(environment: Mapping[str, str] = os.environ) -> str:
    """A name that the ranks of one start share and other starts do not have."""
    job = job_start(environment)
    names = (RENDEZVOUS, "SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    told = [str(environment.get(name)) for name in (*names, "TORCHELASTIC_RESTART_COUNT")]
    return hashlib.sha256("\0".join([str(job), *told]).encode()).hexdigest()[:12]


def _where(error: BaseException) -> str:
    """A name for the place in the code: type and frames, not the message, in which peers name each other."""
    frames = [f"{frame.filename}:{frame.lineno}:{frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return hashlib.sha256("\n".join([type(error).__name__, *frames]).encode()).hexdigest()[:12]


def _in_short(error: BaseException) -> str:
    told = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    line = re.sub(r"\s+", " ", redact(told).strip())
    return line if len(line) <= _MOST_LETTERS else line[: _MOST_LETTERS - 1] + "…"


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
