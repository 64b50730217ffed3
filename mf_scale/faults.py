"""Faults on order, for tests: MF_SCALE_FAULT="kill save.manifest rank=1 step=8; nan loss step=3".

A clause is `ACTION POINT [rank=R] [step=S]`; without rank or step it holds for every one. Nothing sets the variable
but tests, and without it a point costs one look into the environment.
"""

from __future__ import annotations

import errno
import os
import signal
import time

VARIABLE = "MF_SCALE_FAULT"


def reach(point: str, *, rank: int, step: int) -> None:
    """Be at `point` and, if ordered, die of SIGKILL (kill), get a SIGTERM (stop), hang (hang), be a second late (slow),
    be stopped as a whole until a SIGCONT comes (freeze) or see a full disk (full)."""
    if is_ordered("kill", point, rank=rank, step=step):
        os.kill(os.getpid(), signal.SIGKILL)
    if is_ordered("stop", point, rank=rank, step=step):
        os.kill(os.getpid(), signal.SIGTERM)
    if is_ordered("hang", point, rank=rank, step=step):
        time.sleep(3600)
    if is_ordered("freeze", point, rank=rank, step=step):
        os.kill(os.getpid(), signal.SIGSTOP)
    if is_ordered("slow", point, rank=rank, step=step):
        time.sleep(1)
    if is_ordered("full", point, rank=rank, step=step):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_ordered(action: str, point: str, *, rank: int, step: int) -> bool:
    """Whether the environment orders `action` here."""
    orders = os.environ.get(VARIABLE)
    return bool(orders) and any(_fits(clause.split(), action, point, rank, step) for clause in str(orders).split(";"))


def _fits(words: list[str], action: str, point: str, rank: int, step: int) -> bool:
    here = {f"rank={rank}", f"step={step}"}
    return words[:2] == [action, point] and all(word in here for word in words[2:])
