"""How the ranks of a SLURM step meet: rank 0 lets the system choose a port and says in a file where it listens."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from mf_scale.distributed.addresses import own_addresses
from mf_scale.distributed.env import World
from mf_scale.distributed.invitation import NONCE, Door, Invitation, publish, refuse_unwritable, sweep
from mf_scale.errors import FaultError, UserError

LONGEST_WAIT = 120.0
"""Seconds that ranks wait for each other at most; half the time limit of collectives where that is less."""
_SPEAK_SECONDS = 10.0
_LOOK_SECONDS = 0.1
_LAST_WORD_SECONDS = 1.0
"""How long rank 0 stays after it gave the meeting up, for the others to hear why."""
_VERDICT = "verdict"
_SHOWN = 16
_REMEDY = (
    "The job starts again by itself. Should it end here again, look at those nodes, or name rank 0's interface in "
    "MF_ADDRESS."
)


def meet(world: World, file: Path, *, device: str, timeout: float) -> TCPStore:
    """The store through which the ranks find each other; it lives as long as rank 0 keeps it.

    `device` cpu or cuda, the same on all ranks; `timeout` of collectives in seconds. Raises FaultError naming who did
    not come within half of it or two minutes, or came without a GPU; UserError where the folder cannot be written.
    """
    patience = min(LONGEST_WAIT, timeout / 2)
    store = _host(world, file, device, patience) if world.first else _join(world, file, device, patience)
    store.set_timeout(timedelta(seconds=timeout))
    return store


def _host(world: World, file: Path, device: str, patience: float) -> TCPStore:
    # It listens on all interfaces: which of them the others reach is found out by trying.
    store = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=patience), wait_for_workers=False)
    nonce = secrets.token_hex(8)
    store.set(NONCE, nonce)
    publish(file, Invitation(own_addresses(), store.port, nonce))
    try:
        sweep(file)
        _arrive(store, world, device)
        problem = _gathered(store, world.size, file, patience)
        store.set(_VERDICT, json.dumps(problem))
        if problem is not None:
            time.sleep(_LAST_WORD_SECONDS)
            raise FaultError(problem, where=str(file), remedy=_REMEDY)
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
    return store


def _join(world: World, file: Path, device: str, patience: float) -> TCPStore:
    me = f"rank {world.rank} on {socket.gethostname()}"
    try:
        refuse_unwritable(file.parent)
    except UserError as error:
        error.said_by_first_rank = world.local_rank != 0  # once a node
        raise
    door = Door(file)
    waiting = (lambda: f"{me} waits for rank 0: {door.state}, {file}") if world.local_rank == 0 else None
    if not _wait(door.opens, patience, waiting):
        what = f"{me} did not find rank 0 within {patience:.0f} s: {door.state}{_nodes()}"
        raise FaultError(what, where=str(file), remedy=_REMEDY)
    store = door.store
    assert store is not None  # it opened
    try:
        _arrive(store, world, device)
        if not _wait(lambda: store.check([_VERDICT]), patience + _SPEAK_SECONDS, None):
            raise FaultError(f"{me} heard nothing more of rank 0 ({door.state})", where=str(file), remedy=_REMEDY)
        problem = json.loads(store.get(_VERDICT))
    except RuntimeError as error:  # torch's network errors
        what = f"rank 0 ({door.state}) left {me} before all had come: {str(error).splitlines()[0]}"
        raise FaultError(what, where=str(file), remedy=_REMEDY) from error
    if problem is not None:
        told = FaultError(problem, where=str(file), remedy=_REMEDY)
        told.said_by_first_rank = True
        raise told
    return store


def _arrive(store: TCPStore, world: World, device: str) -> None:
    store.set(_name(world.rank), json.dumps([socket.gethostname(), device]))


def _name(rank: int) -> str:
    return f"rank {rank}"


def _gathered(store: TCPStore, size: int, file: Path, patience: float) -> str | None:
    """On rank 0: None once all are there and alike; else who is not."""

    def here() -> list[int]:
        return [rank for rank in range(size) if store.check([_name(rank)])]

    def waiting() -> str:
        return f"rank 0 on {socket.gethostname()} waits for {size - len(here())} of {size} ranks, {file}"

    complete = _wait(lambda: store.check([_name(rank) for rank in range(size)]), patience, waiting)
    there = {rank: json.loads(store.get(_name(rank))) for rank in here()}
    if not complete:
        missing = [rank for rank in range(size) if rank not in there]
        came = _by_host(list(there), {rank: host for rank, (host, _) in there.items()})
        return f"{_ranks(missing)} did not come within {patience:.0f} s: there are {came}{_nodes()}"
    without = [rank for rank, (_, device) in there.items() if device == "cpu"]
    if without and len(without) < size:
        places = _by_host(without, {rank: host for rank, (host, _) in there.items()})
        return f"some ranks see no GPU: {places}, the other {size - len(without)} do"
    return None


def _by_host(ranks: Sequence[int], hosts: dict[int, str]) -> str:
    """`2 ranks (0, 1) on node1, rank 3 on node2`."""
    grouped: dict[str, list[int]] = {}
    for rank in ranks:
        grouped.setdefault(hosts[rank], []).append(rank)
    shown = [f"{_ranks(of)} on {host}" for host, of in grouped.items()]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more nodes" if len(shown) > _SHOWN else "")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"


def _nodes() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    return f"; the nodes of this start are {nodes}" if nodes else ""


def _wait(reached: Callable[[], bool], patience: float, waiting: Callable[[], str] | None) -> bool:
    """Look until `reached`, or until `patience` seconds are over (False); after ten say once what is `waiting`."""
    began = time.monotonic()
    while not reached():
        waited = time.monotonic() - began
        if waited > patience:
            return False
        if waiting is not None and waited > _SPEAK_SECONDS:
            print(f"mf-scale: {waiting()} (up to {patience:.0f} s)", file=sys.stderr, flush=True)
            waiting = None
        time.sleep(_LOOK_SECONDS)
    return True
