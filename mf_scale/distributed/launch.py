"""Start the ranks of one machine as child processes and pass signals and exit codes on. No torch here.

The ranks meet at a file in a temporary folder, so no port is guessed or taken.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mf_scale.distributed.env import RENDEZVOUS
from mf_scale.errors import EXIT_STOPPED

_GRACE = 20.0
"""Seconds the other ranks get to end by themselves after one failed, and again after TERM."""
_PR_SET_PDEATHSIG = 1
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `mf-scale ARGUMENTS` as `processes` ranks; their common exit code, or that of the rank that failed first."""
    with tempfile.TemporaryDirectory(prefix="mf_scale-") as folder:
        children: list[subprocess.Popen[bytes]] = []

        def pass_on(number: int, _: FrameType | None) -> None:
            for child in children:
                if child.poll() is None:
                    child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
        try:
            for rank in range(processes):
                children.append(_start(arguments, rank, processes, str(Path(folder, "rendezvous"))))
            return _wait(children)
        finally:
            _end(children)
            for number, handler in before.items():
                signal.signal(number, handler)


def _start(arguments: Sequence[str], rank: int, size: int, rendezvous: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        RENDEZVOUS: rendezvous,
    }
    # One core's worth of threads a rank: two ranks with all cores each take turns instead of working.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    return subprocess.Popen(
        [sys.executable, "-m", "mf_scale.cli", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - no threads here
    )


def _end_with_parent() -> None:
    """In the child: a launcher that is killed outright takes its ranks along (they save and stop)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    failed: subprocess.Popen[bytes] | None = None
    deadline = float("inf")
    while None in [child.poll() for child in children]:
        if failed is None:
            failed = next((c for c in children if c.returncode not in (None, 0, EXIT_STOPPED)), None)
            deadline = time.monotonic() + _GRACE if failed else deadline
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [child.poll() for child in children]
    if failed is None:
        failed = next((c for c in children if c.returncode not in (None, 0, EXIT_STOPPED)), None)
    if failed is not None:
        return _exit_code(failed.returncode)
    return EXIT_STOPPED if EXIT_STOPPED in codes else 0


def _exit_code(code: int) -> int:
    """As a shell says it: 128 + the signal that killed a process."""
    return 128 - code if code < 0 else code


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """No rank outlives the launcher."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in children:
            if child.poll() is None:
                child.send_signal(number)
        deadline = time.monotonic() + _GRACE
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
