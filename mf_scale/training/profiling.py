"""Torch's profiler over the steps of `train.profile`: a trace for a viewer and a table of what took the time.

RUN/profile/steps-FIRST-LAST-rank-RANK.json.gz    for https://ui.perfetto.dev or chrome://tracing
RUN/profile/steps-FIRST-LAST-rank-RANK.txt
"""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mf_scale import faults
from mf_scale.config.schema import TrainConfig
from mf_scale.distributed.failures import name_rank
from mf_scale.errors import UserError
from mf_scale.rundir import disk_errors, fsync_folder
from mf_scale.training.recorder import Recorder
from mf_scale.training.session import Session
from mf_scale.training.watchdog import Watchdog

FOLDER = "profile"
ROWS = 60
"""Operations in a table."""
_WRITING = ".writing-"
_SILENT = "6"
"""Below, torch's profiler reports its begin and end on stderr, and, as an error, that a machine has no GPU."""


def is_profiled(config: TrainConfig, step: int) -> bool:
    """Whether `step` (from 1) is one of `train.profile`, on whichever rank."""
    return bool(config.profile) and config.profile[0] <= step <= config.profile[-1]


class Profiler:
    """Records the steps of `train.profile` on this rank; does nothing where it is none of `train.profile_ranks`."""

    def __init__(self, session: Session, recorder: Recorder, watchdog: Watchdog) -> None:
        self._session, self._recorder, self._watchdog = session, recorder, watchdog
        self._config = session.config.train
        wanted = bool(self._config.profile) and session.world.rank in self._config.profile_ranks
        self._last = self._config.profile[-1] if wanted else 0
        self._folder = session.run.path / FOLDER
        self._profile: Any = None
        self._first = 0
        """The first step that is recorded; 0: none is so far."""
        self._marked: Any = None

    def begin_step(self) -> None:
        """The next step begins. The one before the first gets the profiler going, which takes a GPU some seconds."""
        step = self._session.state.step + 1
        if step > self._last or not (is_profiled(self._config, step) or is_profiled(self._config, step + 1)):
            return
        if self._profile is None:
            self._profile = _profile(self._session.device)
            self._profile.prepare_trace()
        if is_profiled(self._config, step):
            if not self._first:
                self._first = step
                self._profile.start_trace()
            self._marked = record_function(f"step {step}")
            self._marked.__enter__()

    def end_step(self, *, looks: bool = False) -> float:
        """A step is done; after the last one what was recorded is written. Seconds that this took.

        `looks`: a validation or an evaluation follows. It is no step, and thousands of images would fill the memory:
        what was recorded is written before, and the steps behind it make a profile of their own.
        """
        if self._marked is None:
            return 0.0
        began, step = time.perf_counter(), self._session.state.step
        self._end_mark()
        if step == self._last or looks:
            self._watchdog.alive("profile", step)
            if self._session.device.type == "cuda":
                torch.cuda.synchronize(self._session.device)  # what the last step began belongs to it
            recorded, self._profile = self._profile, None
            recorded.stop_trace()
            self._say(self._written(recorded, step))
            self._first = 0
        return time.perf_counter() - began

    def close(self) -> None:
        """Throw away what a stop cut short; the next start records the steps that it takes."""
        if self._profile is None:
            return
        self._end_mark()
        if not self._first:
            self._profile.start_trace()  # as torch's own schedule ends one that was only made ready
        self._profile.stop_trace()
        self._profile = None
        if self._first:
            self._say(f"the run stops within train.profile: what was recorded from step {self._first} is lost")

    def _say(self, text: str) -> None:
        """To the console, also from another rank than the first, which is the only one that the recorder hears."""
        if self._session.world.first:
            self._recorder.note(text)
        else:
            print(name_rank(text, self._session.world), file=sys.stderr, flush=True)

    def _end_mark(self) -> None:
        if self._marked is not None:
            self._marked.__exit__(None, None, None)
            self._marked = None

    def _written(self, recorded: Any, last: int) -> str:
        """Write what was recorded; a sentence. What cannot be written (a full disk) does not end the run."""
        try:
            with disk_errors(self._folder):
                self._write(recorded, last)
        except UserError as error:
            return f"the profile of steps {self._first} to {last} was not written: {error.what}"
        return f"the profile of steps {self._first} to {last} is in {self._folder}"

    def _write(self, recorded: Any, last: int) -> None:
        rank = self._session.world.rank
        name = f"steps-{self._first}-{last}-rank-{rank}"
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob(f"{_WRITING}*-rank-{rank}.*"):  # of a start that was killed at it
            old.unlink()
        table, trace = (self._folder / f"{_WRITING}{name}{end}" for end in (".txt", ".json.gz"))
        table.write_text(_tables(recorded, self._session.device), encoding="utf-8")
        _write_trace(recorded, trace)
        faults.reach("profile.written", rank=rank, step=last)
        self._session.fence.check()
        for file in (trace, table):
            file.replace(file.with_name(file.name.removeprefix(_WRITING)))
        fsync_folder(self._folder)


@contextmanager
def profiled(session: Session, recorder: Recorder, watchdog: Watchdog) -> Iterator[Profiler]:
    """A block with the session's profiler."""
    profiler = Profiler(session, recorder, watchdog)
    try:
        yield profiler
    finally:
        profiler.close()


def _profile(device: torch.device) -> Any:
    os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)  # read when the first one is made ready
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return profile(activities=activities, record_shapes=True, acc_events=True)


def _tables(recorded: Any, device: torch.device) -> str:
    """The operations that took most of the CPU's time by themselves, and of the GPU's where there is one."""
    averages = recorded.key_averages()
    parts = [f"By the CPU's own time\n{averages.table(sort_by='self_cpu_time_total', row_limit=ROWS)}"]
    if device.type == "cuda":
        parts.append(f"By the GPU's own time\n{averages.table(sort_by='self_device_time_total', row_limit=ROWS)}")
    return "\n\n".join(parts) + "\n"


def _write_trace(recorded: Any, file: Path) -> None:
    """torch writes a file of its own, which is compressed into ours in pieces and forced to the disk."""
    plain = file.with_suffix("")
    try:
        recorded.export_chrome_trace(str(plain))
        with plain.open("rb") as given, file.open("wb") as raw:
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=5, mtime=0) as packed:
                shutil.copyfileobj(given, packed, 1 << 20)
            raw.flush()
            os.fsync(raw.fileno())
    finally:
        plain.unlink(missing_ok=True)
