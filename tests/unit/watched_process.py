"""A process for test_watchdog.py: a watchdog on short times, and a main thread that does what the first argument says.

Arguments: what to do, a folder for the reports.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mf_scale.distributed.env import World
from mf_scale.training import watchdog as module
from mf_scale.training.watchdog import FIRST_TIMES, Watchdog

TIMEOUT, LAST_RESORT = 1.0, 2.0
module._TELL_SECONDS = 3.0


def samples(phase: str, step: int, turn: int) -> list[str]:
    if sys.argv[1] == "hang-in-the-index-too":
        time.sleep(60)
    return [f"key-{step}  source/shard-000.tar" if phase == "step" else f"image {turn} of phase {phase}"]


def main() -> None:
    doing, folder = sys.argv[1], Path(sys.argv[2])
    watchdog = Watchdog(World(1, 2, 0), folder, timeout=TIMEOUT, last_resort=LAST_RESORT)
    watchdog.start()
    watchdog.opened(7, samples)
    for step in (1, 2):
        watchdog.alive("data", step)
        watchdog.alive("step", step)
    print("ready", flush=True)
    if doing == "work-slowly":
        for step in range(3, 6):
            time.sleep(0.5 * TIMEOUT)
            watchdog.alive("data", step)
        watchdog.alive("validation", 5)
        time.sleep(0.5 * TIMEOUT * FIRST_TIMES)  # new, so it may
        watchdog.alive("step", 6)
    elif doing == "hold-the-lock":
        ctypes.PyDLL(None).sleep(60)  # unlike CDLL, it does not let the interpreter go
    elif doing == "hang-in-a-new-phase":
        watchdog.alive("validation", 2)
        time.sleep(60)
    elif doing == "hang-in-an-evaluation":
        for sign in (("evaluation", 1, 3), ("step", 2), ("evaluation", 2, 0), ("evaluation", 2, 1)):
            watchdog.alive(*sign)
        time.sleep(60)
    elif doing == "write-nowhere":
        folder.parent.mkdir(exist_ok=True)
        folder.write_text("a file")
        time.sleep(60)
    else:
        time.sleep(60)
    watchdog.close()
    time.sleep(2 * TIMEOUT)  # nobody watches any more
    print("lived", flush=True)
    os._exit(0)


main()
