"""How long this process has been running, counted from its start by the system, interpreter and imports included."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()


def seconds_since_start() -> float:
    """Seconds, to a hundredth; where the system does not tell (no /proc), since this module was imported."""
    try:
        # The second field is the command in parentheses and may hold blanks; the start is the 22nd, in clock ticks.
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        running = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        running = -1.0
    return running if running >= 0 else time.monotonic() - _IMPORTED
