"""Start the ranks of one machine as child processes and pass signals and exit codes on. No torch here.

The ranks meet at a file in a temporary folder, so no port is guessed or taken.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from mf_scale.config.signals import DEFAULT
from mf_scale.distributed.env import RENDEZVOUS
from mf_scale.errors import EXIT_FAULT, EXIT_GUARD, EXIT_STOPPED, EXIT_USER

RANK_MODULE = "mf_scale.cli"
_GRACE = 20.0
"""Seconds the other ranks get to end by themselves after one failed, and again after TERM."""
_PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], processes: int, asked: Sequence[str], held: Sequence[str] = DEFAULT) -> int:
    """Run `mf-scale ARGUMENTS` as `processes` ranks; their common exit code, or that of the rank that failed.

    `asked` is the live list of the names of signals this process has caught; every rank gets each of them once, also
    those that came before it was started. `held` are the stop signals of the run (train.stop_signals).
    """
    with tempfile.TemporaryDirectory(prefix="mf_scale-") as folder:
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(processes):
                if asked:  # before they can have met: nothing was begun, and those that are there would wait
                    return EXIT_STOPPED
                children.append(_start(arguments, rank, processes, str(Path(folder, "rendezvous")), held))
            return _wait(children, asked)
        finally:
            _end(children)


def _start(
    arguments: Sequence[str], rank: int, size: int, rendezvous: str, held: Sequence[str]
) -> subprocess.Popen[bytes]:
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
        [sys.executable, "-m", RANK_MODULE, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=partial(_end_with_parent, held),  # noqa: PLW1509 - no threads here
    )


def allow_stop_signals(names: Iterable[str] = DEFAULT) -> None:
    """In a rank: let the stop signals in that `launch` holds back until somebody is there to take them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.Signals[name] for name in names])


def _end_with_parent(held: Sequence[str] = DEFAULT) -> None:
    """In the child: a launcher that is killed outright takes its ranks along (they save and stop).

    Stop signals wait until the child is ready (`allow_stop_signals`): before, their default would kill it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[name] for name in held])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.Signals[held[0]] if held else signal.SIGTERM)


def _wait(children: Sequence[subprocess.Popen[bytes]], asked: Sequence[str]) -> int:
    passed_on, deadline = 0, float("inf")
    failures: list[int] = []
    said: set[int] = set()
    while None in [child.poll() for child in children]:
        for name in asked[passed_on:]:
            passed_on += 1
            _send(children, signal.Signals[name])
        _say_killed(children, asked, said)
        if not failures:
            failures = _failures(children)
            deadline = time.monotonic() + _GRACE if failures else deadline
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    _say_killed(children, asked, said)
    # What a person can act on says more than the broken connection that its peers saw.
    telling = [code for code in _failures(children) if code in (EXIT_USER, EXIT_GUARD, EXIT_FAULT)]
    failures = telling or failures or _failures(children)
    if failures:
        return _exit_code(failures[0])
    return EXIT_STOPPED if EXIT_STOPPED in [child.returncode for child in children] else 0


def _say_killed(children: Sequence[subprocess.Popen[bytes]], asked: Sequence[str], said: set[int]) -> None:
    """Name the ranks that a signal ended, each once: they could not say it themselves."""
    for rank, child in enumerate(children):
        if child.returncode is not None and child.returncode < 0 and rank not in said:
            said.add(rank)
            name = signal_name(-child.returncode)
            if name not in asked:
                print(
                    f"mf-scale: rank {rank} on {socket.gethostname()} was killed by {name}", file=sys.stderr, flush=True
                )


def signal_name(number: int) -> str:
    """SIGKILL of 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _failures(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [c.returncode for c in children if c.returncode not in (None, 0, EXIT_STOPPED)]


def _send(children: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _exit_code(code: int) -> int:
    """As a shell says it: 128 + the signal that killed a process."""
    return 128 - code if code < 0 else code


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """No rank outlives the launcher."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _send(children, number)
        deadline = time.monotonic() + _GRACE
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
