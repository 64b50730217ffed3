"""The background thread of one rank that writes a checkpoint's files. No collective runs in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mf_scale.errors import UserError
from mf_scale.rundir import NO_SPACE


@dataclass(frozen=True)
class Outcome:
    """How a job in the background ended."""

    result: Any
    """What it returned; None where it failed."""
    problem: str | None
    """Why it failed, as a sentence."""
    seconds: float


def attempt(action: Callable[[], Any]) -> Outcome:
    """Run a disk action and catch what goes wrong."""
    began = time.monotonic()
    result, problem = None, None
    try:
        result = action()
    except OSError as error:
        problem = _disk_problem(error)
    except UserError as error:
        # The remedies of `disk_errors` are for a program that ends.
        cause = error.__cause__
        problem = _disk_problem(cause) if isinstance(cause, OSError) else f"{error.what}. {error.remedy}"
    except Exception as error:  # whatever it is, the training goes on and the person reads it
        problem = f"{type(error).__name__}: {error}"
    return Outcome(result, problem, time.monotonic() - began)


def _disk_problem(error: OSError) -> str:
    what = f"cannot write: {error.strerror or error}"
    return f"{what}. Free some space, or raise the quota" if error.errno in NO_SPACE else what


class Writer:
    """Runs one job at a time behind the training.

    Its thread is no daemon: a process that ends waits for the job, so that no file is left torn by an orderly exit.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    @property
    def busy(self) -> bool:
        """A job was started and its outcome not taken yet."""
        return self._thread is not None

    @property
    def ended(self) -> bool:
        """A job has ended, well or not, and its outcome was not taken yet."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, job: Callable[[], Any]) -> None:
        """Begin `job`; RuntimeError while another one's outcome was not taken."""
        if self.busy:
            raise RuntimeError("a second write was to begin before the first one's outcome was taken")
        self._thread = threading.Thread(target=self._run, args=(job,), name=self._name)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the job to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def wait(self) -> Outcome:
        """Wait for the job and take its outcome; RuntimeError where none was started."""
        if self._thread is None:
            raise RuntimeError("nothing was started")
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        assert outcome is not None  # the thread's last act
        return outcome

    def _run(self, job: Callable[[], Any]) -> None:
        self._outcome = attempt(job)
