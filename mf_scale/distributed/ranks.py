"""The ranks that torch's agent starts on this machine: who they are, and how each ended. No torch here.

The agent forwards TERM alone, and takes every exit code but 0 for a failure, after which the other ranks have 30 s
before they are killed: too little for one that still ends its W&B run. So each rank leaves word in a folder: its
process id at its start, its exit code at its end; and one that was stopped with its state committed leaves with 0.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from mf_scale.errors import EXIT_FAULT, EXIT_GUARD, EXIT_STOPPED, EXIT_USER

FOLDER = "MF_RANKS"
"""Environment variable with the folder in which the ranks leave word."""
LAUNCHER = "MF_LAUNCHER"
"""Environment variable with the process id of the launcher."""
DEATH_SIGNAL = "MF_DEATH_SIGNAL"
"""Environment variable with the name of the signal that a rank gets when its launcher is killed."""
_PR_SET_PDEATHSIG = 1


class Ranks:
    """The launcher's side of the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._passed_on: dict[int, int] = {}

    def environment(self, death_signal: str) -> dict[str, str]:
        """What the ranks' environment needs."""
        return {FOLDER: str(self._folder), LAUNCHER: str(os.getpid()), DEATH_SIGNAL: death_signal}

    def processes(self) -> list[int]:
        """Process ids of the ranks that run; a number that is another process's by now is not among them."""
        return [pid for pid in self._read("pid").values() if _parent(pid) == os.getpid()]

    def pass_on(self, asked: Sequence[str]) -> None:
        """Send every rank each of the signals once, also those that came before it was there."""
        for pid in self.processes():
            for name in asked[self._passed_on.get(pid, 0) :]:
                os.kill(pid, signal.Signals[name])
            self._passed_on[pid] = len(asked)

    def stopped(self) -> bool:
        """Whether a rank ended with its state committed, on request."""
        return EXIT_STOPPED in self._read("code").values()

    def _read(self, kind: str) -> dict[str, int]:
        return {file.stem: int(file.read_text()) for file in self._folder.glob(f"*.{kind}")}


def enter(environment: Mapping[str, str] = os.environ) -> None:
    """In a rank, first of all: end with the launcher, and leave word of the process id.

    Stop signals are held back from the launcher on, until somebody takes them (`allow_stop_signals`).
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.Signals[environment[DEATH_SIGNAL]])
    if os.getppid() != int(environment[LAUNCHER]):  # it was killed before
        os._exit(EXIT_FAULT)
    _word(environment, "code").unlink(missing_ok=True)
    _leave_word(environment, "pid", os.getpid())


def exit_code_for_agent(code: int, environment: Mapping[str, str] = os.environ) -> int:
    """In a rank, last of all: leave word of the exit code; what the agent is to see."""
    _leave_word(environment, "code", code)
    return 0 if code == EXIT_STOPPED else code


def common_code(codes: Sequence[int], *, stopped: bool) -> int:
    """One exit code of the ranks' that are not 0, in the order in which they were seen; of a signal 128 + its number.

    What a person can act on says more than the broken connection that its peers saw.
    """
    telling = [code for code in codes if code in (EXIT_USER, EXIT_GUARD, EXIT_FAULT)]
    if telling or codes:
        code = (telling or list(codes))[0]
        return 128 - code if code < 0 else code
    return EXIT_STOPPED if stopped else 0


def _word(environment: Mapping[str, str], kind: str) -> Path:
    return Path(environment[FOLDER], f"{environment['LOCAL_RANK']}.{kind}")


def _leave_word(environment: Mapping[str, str], kind: str, number: int) -> None:
    file = _word(environment, kind)
    temporary = file.with_suffix(f".new-{kind}")
    temporary.write_text(str(number))
    temporary.replace(file)


def _parent(pid: int) -> int:
    """Process id of the parent of a process that runs; 0 where there is none."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent)
