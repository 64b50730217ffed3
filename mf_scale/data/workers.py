"""Workers: the parts of a stream from loader processes, taken in turn, so in an order that no timing changes."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset

from mf_scale.config.signals import STOPPING

SHIELDED = tuple(signal.Signals[name] for name in STOPPING)
"""Whatever train.stop_signals may name; a worker that died of one would take the last save with it."""

_LOOK_SECONDS = 1.0
"""How often the wait for an item is interrupted to ask whether anybody still wants it."""
_TIMED_OUT = "DataLoader timed out"
"""How the error begins by which torch tells that an item has not come yet; nothing but its text sets it apart."""
_REAP_SECONDS = 2.0
"""How long a broken connection waits for the end of the worker that broke it."""


def worker_parts(
    stream: IterableDataset[Any],
    *,
    workers: int,
    prefetch: int,
    rank: int,
    give_up: Callable[[], bool],
    last: Callable[[int], str],
) -> Generator[Any, None, None]:
    """Items of the stream's copies in `workers` processes, round robin; `prefetch` items ahead in each.

    While an item keeps it waiting it asks `give_up` once a second, and ends where that is true. Raises RuntimeError
    naming rank, worker and what `last` says of it where one died, within seconds. `.close()` ends them quietly and at
    once, also in a read.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # data.workers is the user's to set
        loader: DataLoader[Any] = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch,
            timeout=_LOOK_SECONDS,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(0),  # else the loader draws from the global generator
        )
        iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's own handler would raise in the middle of whatever the trainer is doing; `next` finds out as well
        signal.signal(signal.SIGCHLD, handler)
    processes = list(getattr(iterator, "_workers", []))
    try:
        while True:
            try:
                item = next(iterator)
            except (RuntimeError, ConnectionError, EOFError) as error:
                if str(error).startswith(_TIMED_OUT):
                    # The loader counts an item only once it has it: asked again, it goes on waiting for the same one.
                    if give_up():
                        return
                    continue
                # A worker that is killed while it hands something over shows as a broken connection.
                raise _report_dead(processes, rank, last, error) from error
            yield item
    finally:
        for process in processes:
            # They only read. Asked to leave, one that sits in a read that hangs takes torch's five seconds, and each
            # of the others five more after it, while a stop is waiting to be saved.
            process.kill()
        del iterator


def _report_dead(processes: list[Any], rank: int, last: Callable[[int], str], error: Exception) -> Exception:
    deadline = time.monotonic() + _REAP_SECONDS
    while all(p.is_alive() for p in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    dead = [
        f"{i} ({', '.join(filter(None, [f'pid {p.pid}', f'exit code {p.exitcode}', last(i)]))})"
        for i, p in enumerate(processes)
        if not p.is_alive()
    ]
    if not dead:
        return error
    return RuntimeError(
        f"rank {rank}: data worker {', '.join(dead)} died; the usual cause is memory: "
        "lower data.workers, data.prefetch_steps or data.buffer_mib"
    )


def _as_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    for number in SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
