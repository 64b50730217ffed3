"""Stop requests only set a flag; the ranks agree on it once a step. No torch: the handlers stand before slow imports.

A request is a signal of train.stop_signals, as often as it comes, or a deadline: the job's end less train.stop_before.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from mf_scale.config.signals import DEFAULT, STOPPING
from mf_scale.distributed.launch import allow_stop_signals
from mf_scale.errors import UserError

if TYPE_CHECKING:
    from mf_scale.config.schema import Config

_END, _START = "SLURM_JOB_END_TIME", "SLURM_JOB_START_TIME"
"""Unix seconds; SLURM sets both in a job that has a time limit."""


@dataclass
class StopFlag:
    """Whether this process was asked to stop, and by what."""

    signals: list[str] = field(default_factory=list)
    """Names of the signals that came, in order, repeats included."""
    deadline: float = float("inf")
    """Unix seconds at which the process is asked to stop by its clock."""

    @property
    def wanted(self) -> bool:
        """True from the first signal or from the deadline on; costs one look at the clock."""
        return bool(self.signals) or time.time() >= self.deadline

    @property
    def reason(self) -> str:
        """What asked first; empty while nothing did."""
        if self.signals:
            return self.signals[0]
        ends = time.strftime("%H:%M:%S", time.localtime(self.deadline)) if self.wanted else ""
        return f"deadline: train.stop_before the end of the job, {ends}" if ends else ""


def install_handlers() -> StopFlag:
    """Catch the default stop signals from now on, before the configuration is known."""
    flag = StopFlag()
    _catch(flag, DEFAULT)
    return flag


def configure(flag: StopFlag, config: Config, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Catch `train.stop_signals` and no others, and set the deadline. Sentences about what was ignored.

    A signal that is not wanted does what it does by default, also one that has come already. Raises UserError where
    the deadline would lie before the job's start, so that no start of it could ever take a step.
    """
    wanted = config.train.stop_signals
    _catch(flag, wanted)
    for name in DEFAULT:
        if name not in wanted:
            number = signal.Signals[name]
            signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    unwanted = [name for name in flag.signals if name not in wanted]
    flag.signals[:] = [name for name in flag.signals if name in wanted]
    for name in unwanted:
        signal.raise_signal(signal.Signals[name])
    flag.deadline, notes = _deadline(config.train.stop_before, environment)
    return notes


def _catch(flag: StopFlag, names: list[str] | tuple[str, ...]) -> None:
    def note(number: int, _: FrameType | None) -> None:
        flag.signals.append(signal.Signals(number).name)

    for name in names:
        assert name in STOPPING  # validated
        signal.signal(signal.Signals[name], note)
    allow_stop_signals(names)


def _deadline(minutes: float, environment: Mapping[str, str]) -> tuple[float, list[str]]:
    """Unix seconds, and why there is no deadline although the environment names an end."""
    none = float("inf")
    if not minutes or _END not in environment:
        return none, []
    try:
        end, start = float(environment[_END]), float(environment.get(_START) or 0)
    except ValueError:
        return none, [f"{_END} = {environment[_END]!r} is no number of seconds: the run has no deadline"]
    if not time.time() < end < none:  # another job's, taken along into a shell; or not a number
        return none, [f"{_END} = {environment[_END]} is not to come: the run has no deadline"]
    deadline = end - 60 * minutes
    if start and deadline <= start:
        raise UserError(
            f"train.stop_before = {minutes:g} minutes is as long as the whole job of {(end - start) / 60:g} minutes",
            where=f"{_START}, {_END}",
            remedy="Lower train.stop_before or ask SLURM for a longer --time.",
        )
    return deadline, []
