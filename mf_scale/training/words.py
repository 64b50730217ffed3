"""The first and the last word of a start in metrics.jsonl: where it runs and what came before it; why it ended."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mf_scale.distributed import comm
from mf_scale.distributed.env import World, job_start
from mf_scale.errors import PARAGRAPHS
from mf_scale.rundir import RunDir
from mf_scale.tracking.after import what_came_before

_MOST_LETTERS = 300
_INTERRUPTED = 130


def start_facts(run: RunDir, world: World, *, start: int, step: int) -> dict[str, Any]:
    """What the `start` event of start `start` tells beside its settings; on all ranks together, before it is written.

    {"job", "restart"} (null outside SLURM), "hosts" in the order of their ranks, "after": `what_came_before`. Only
    the first rank knows "after".
    """
    own = job_start()
    job, restart = (own.job, own.restart) if own else (None, None)
    hosts = comm.gather_objects(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    after = None
    if world.first:
        with suppress(OSError):  # a file that cannot be read is no reason not to train
            after = what_came_before(run, start=start, step=step, job=job, restart=restart)
    return {"job": job, "restart": restart, "hosts": list(dict.fromkeys(hosts or ())), "after": after}


_LOST_PEER = re.compile(r"(gloo|nccl).*(closed by peer|reset by peer|timed out|timeout)", re.IGNORECASE | re.DOTALL)
"""What gloo and NCCL say, in many words, when a peer is gone: the reason is its, not theirs."""


def last_word(error: BaseException, of_peer: Callable[[], str | None] = lambda: None) -> dict[str, Any]:
    """`reason` and `exit_code` of the `stop` event of a start that an error ends.

    `of_peer`: asked where another rank was the first to end: what that rank left about it, None: nothing.
    """
    if isinstance(error, PARAGRAPHS):
        return {"reason": _short(error.what), "exit_code": error.exit_code}
    told = str(error).strip().partition("\n")[0]
    if isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)):
        told_by_it = of_peer()
        reason = told_by_it or "the connection to another rank broke, which had ended or hung"
        return {"reason": _short(reason), "exit_code": 1}
    code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return {"reason": _short(f"{type(error).__name__}: {told}".removesuffix(": ")), "exit_code": code}


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"
