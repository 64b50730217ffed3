"""A rank that hangs ends itself: without a sign of life for train.hang_timeout it writes its stacks and exits with 75.

A thread watches. Where not even that can run, since something holds the interpreter's lock, a timer of C's ends the
process later, with its stacks on stderr and exit code 1.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mf_scale.config.schema import Config
from mf_scale.distributed.env import World, job_start
from mf_scale.errors import EXIT_FAULT

FIRST_TIMES = 5
"""Times as long that a phase may take when it comes for the first time: kernels are compiled, caches are empty."""
KEPT = 50
"""Files of earlier hangs that a start leaves in the folder."""
_TELL_SECONDS = 20.0
"""How long the report may take: it may go to the very storage that hangs."""
_MARGIN_SECONDS = 30.0
_OPENING = "start"
EVALUATION = "evaluation"

Samples = Callable[[str, int, int], list[str]]
"""What this rank has in hand in a phase, a step (from 1) and a turn of it: samples and their shards, in words."""


class _Sign(NamedTuple):
    phase: str
    step: int
    turn: int


class Watchdog:
    """Watches one rank from `start` to `close`; without `start` it does nothing."""

    def __init__(
        self,
        world: World,
        folder: Path,
        *,
        timeout: float,
        last_resort: float,
    ) -> None:
        """`folder` gets the reports; `timeout` in seconds without a sign of life; `last_resort` in seconds without a
        moment for the watching thread."""
        self._world, self._folder = world, folder
        self._timeout, self._last_resort = timeout, last_resort
        self._sign = _Sign(_OPENING, 0, 0)
        self._passed: set[str] = set()
        """Phases that came to an end before."""
        self._name = time.strftime("opening-%Y%m%d-%H%M%S", time.gmtime())
        self._told_as = self._name
        """The name that the last report took: it changes once the run directory is this run's."""
        self._samples: Samples | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def alive(self, phase: str, step: int, turn: int = 0) -> None:
        """A sign of life: phase start, data, step, validation, evaluation, profile, save or end, of `step`, begins or
        goes on; `turn` counts the images of an evaluation.

        One that came to an end before may take `timeout`, a new one five times as long. Costs half a microsecond.
        """
        self._passed.add(self._sign.phase)
        self._sign = _Sign(phase, step, turn)
        if phase == _OPENING:  # of another session, which warms up anew
            self._passed.clear()

    def opened(self, start: int, samples: Samples) -> None:
        """The run directory is this run's: number of the start, for the report's name, and what a step takes."""
        self._name, self._samples = f"start-{start}", samples
        if self._thread is not None and self._world.first:
            with suppress(OSError):
                _sweep(self._folder)

    def _watch(self) -> None:
        tick = min(1.0, self._timeout / 10)
        seen, quiet, before = self._sign, 0.0, time.monotonic()
        told: _Sign | None = None
        while True:
            faulthandler.dump_traceback_later(self._last_resort, exit=True, file=2)
            closed = self._closed.wait(tick)
            if told is seen and self._sign is not seen:
                threading.Thread(target=self._take_back, args=(self._file(), quiet), daemon=True).start()
                told = None
            if closed:  # by an error too: what was told of a phase that never ended stays
                return
            now = time.monotonic()
            # No more than two ticks: while the process or the machine was suspended, nothing could give a sign.
            quiet, before = quiet + min(now - before, 2 * tick), now
            if self._sign is not seen:
                seen, quiet = self._sign, 0.0
            if quiet <= self._timeout:
                continue
            if quiet > self._timeout * self._patience(seen):
                self._tell(seen, quiet)
                os._exit(EXIT_FAULT)
            if told is not seen:
                # Should it hang, its peers' collectives reach their time limit before it is ended, and all are killed.
                told = seen
                self._tell(seen, quiet)

    def _patience(self, sign: _Sign) -> int:
        return 1 if sign.phase in self._passed else FIRST_TIMES

    def _tell(self, sign: _Sign, quiet: float) -> None:
        faulthandler.dump_traceback_later(self._last_resort + _TELL_SECONDS, exit=True, file=2)
        report = threading.Thread(target=self._report, args=(sign, quiet), daemon=True)
        report.start()
        report.join(_TELL_SECONDS)

    def _take_back(self, file: Path, quiet: float) -> None:
        """What is left in the folder is of ranks that hung."""
        with suppress(OSError):
            file.unlink()
            print(f"mf-scale: rank {self._world.rank} goes on after {quiet:.0f} s", file=sys.stderr, flush=True)
            self._folder.rmdir()  # where it is empty

    def _file(self) -> Path:
        return self._folder / f"{self._told_as}-rank-{self._world.rank}-of-{self._world.size}.txt"

    def _report(self, sign: _Sign, quiet: float) -> None:
        self._told_as = self._name
        file = self._file()
        where, limit = f"in phase {sign.phase} of step {sign.step}", self._timeout * self._patience(sign)
        rank = f"rank {self._world.rank}"
        what = f"{rank} hangs: no sign of life for {quiet:.0f} s, {where}"
        if quiet <= limit:
            what = f"{rank}: no sign of life for {quiet:.0f} s, {where}, which is new and may take {limit:.0f} s"
        print(f"mf-scale: {what}; its stacks go to {file}", file=sys.stderr, flush=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            print(f"mf-scale: the file cannot be written: {error.strerror}", file=sys.stderr, flush=True)
            handle = 2
        job = job_start()
        of = f", job {job.job} restart {job.restart}" if job else ""
        here = f"pid {os.getpid()} on {socket.gethostname()}{of}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.write(handle, f"{what}\n{here}\n\n".encode())
        faulthandler.dump_traceback(handle, all_threads=True)
        os.fsync(handle) if handle != 2 else None
        # Last: to look them up, the index is read, which may lie on the storage that hangs.
        samples = self._samples(*sign) if self._samples is not None else []
        of = f"turn {sign.turn} of the evaluation at " if sign.phase == EVALUATION else ""
        os.write(handle, "\n".join(["", f"this rank's samples of {of}step {sign.step}:", *samples, ""]).encode())


def _sweep(folder: Path) -> None:
    """Keep the newest reports of earlier starts only."""
    if folder.is_dir():
        reports = sorted(folder.glob("*-rank-*.txt"), key=lambda file: file.stat().st_mtime)
        for file in reports[:-KEPT]:
            file.unlink()


@contextmanager
def watched(config: Config, world: World) -> Iterator[Watchdog]:
    """A block in which this rank is watched, where train.hang_timeout is not 0."""
    train = config.train
    # A job that was suspended loses its collectives after their time limit; it should not lose itself before.
    last_resort = max(train.hang_timeout + _MARGIN_SECONDS, train.collective_timeout)
    folder = Path(config.run_dir, "hang")
    watchdog = Watchdog(world, folder, timeout=train.hang_timeout, last_resort=last_resort)
    if train.hang_timeout > 0:
        watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()
