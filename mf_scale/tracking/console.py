"""The console of rank 0: one live line on a terminal, one plain line an interval in a log file."""

from __future__ import annotations

import contextlib
import shutil
from typing import TextIO


class ProgressLine:
    """Progress of a run on `stream`; on a terminal the line is rewritten in place."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self.total_steps = total_steps
        self.stream = stream
        self.live = stream.isatty()
        self._line = ""

    def update(
        self,
        step: int,
        loss: float | None = None,
        images_per_second: float | None = None,
        data_wait: float | None = None,
        eta: float | None = None,
    ) -> None:
        """Show the state after `step`; what is None is left out.

        `data_wait`: seconds a step waits for data; `eta`: seconds left.
        """
        width = len(f"{self.total_steps:,}")
        share = min(1.0, step / self.total_steps) if self.total_steps else 1.0
        parts = [f"step {step:>{width},}/{self.total_steps:,} {share:4.0%}"]
        if loss is not None:
            parts.append(f"loss {loss:.4g}")
        if images_per_second is not None:
            parts.append(f"{images_per_second:.1f} images/s")
        if data_wait is not None:
            parts.append(f"data wait {data_wait * 1000:.0f} ms")
        if eta is not None:
            parts.append(f"eta {duration(eta)}")
        self._show(" · ".join(parts))

    def note(self, text: str) -> None:
        """Print `text` on lines of its own, above the live line."""
        live, self._line = self._line, ""
        self._write(f"{_CLEAR}{text}\n" if self.live else f"{text}\n")
        if live:
            self._show(live)

    def close(self) -> None:
        """Leave the live line standing and go to the next."""
        if self._line:
            self._write("\n")
            self._line = ""

    def _show(self, line: str) -> None:
        if not self.live:
            self._write(f"{line}\n")
            return
        self._line = line
        columns = shutil.get_terminal_size().columns
        self._write(f"{_CLEAR}{line[: max(1, columns - 1)]}")

    def _write(self, text: str) -> None:
        # A reader that left (`| head`), a full disk under a log, a terminal that is gone: no reason to stop a run.
        with contextlib.suppress(OSError):
            self.stream.write(text)
            self.stream.flush()


_CLEAR = "\r\x1b[K"


def duration(seconds: float) -> str:
    """A short reading of a time span: 45 s, 3 min 05 s, 2 h 13 min, 4 d 06 h."""
    if not 0 <= seconds < float("inf"):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
