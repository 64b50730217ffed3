"""Signals only set a flag; the ranks agree on it once a step. No torch: the handlers stand before the slow imports."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from types import FrameType

from mf_scale.distributed.launch import STOP_SIGNALS, allow_stop_signals


@dataclass
class StopFlag:
    """Whether this process was asked to stop, and by which signal."""

    signals: list[str] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        return bool(self.signals)

    @property
    def reason(self) -> str:
        return self.signals[0] if self.signals else ""


def install_handlers() -> StopFlag:
    """Catch the stop signals from now on. They may come several times (SLURM sends TERM twice)."""
    flag = StopFlag()

    def note(number: int, _: FrameType | None) -> None:
        flag.signals.append(signal.Signals(number).name)

    for stop in STOP_SIGNALS:
        signal.signal(stop, note)
    allow_stop_signals()
    return flag
