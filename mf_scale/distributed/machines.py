"""Machines without SLURM that train together: where their launchers meet, and one word of all on how a start ended.

The store stands at MF_RDZV_ENDPOINT, in the launcher of the machine that has this address, for as long as it lives.
That launcher decides; the others do as it says, so that none trains on while another is through.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mf_scale.distributed.elastic import Place, alone
from mf_scale.distributed.ranks import common_code
from mf_scale.errors import EXIT_FAULT, EXIT_GUARD, EXIT_STOPPED, EXIT_USER, FaultError, UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_NODES, _ENDPOINT = "MF_NNODES", "MF_RDZV_ENDPOINT"
_JOIN_SECONDS = 900.0
"""How long a machine waits for the others to be started."""
_END_SECONDS = 120.0
"""How long one that is through waits for the others' word: their ranks end with its own, or 30 s later by force."""


class OneMachine:
    """A machine by itself: nobody to meet, nobody to ask."""

    def place(self, asked: Sequence[str]) -> Place:
        """Where the next start meets."""
        return alone()

    def agree(self, code: int, over: bool) -> tuple[int, bool]:
        """The common exit code of the start, and whether any machine wants no other one."""
        return code, over


class Machines:
    """One of several machines."""

    def __init__(self, machines: int, endpoint: str, asked: Sequence[str]) -> None:
        """Hold the store, or wait for it; raises UserError, FaultError, or StopAsked while waiting."""
        self._machines, self._number = machines, 0
        host, port = _parse(endpoint)
        address = _resolve(host)
        self._endpoint = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._host, self._store = _open_store(address, port, asked)
        self._address = _own_address(address, port)

    def place(self, asked: Sequence[str]) -> Place:
        """Where the next start meets; a machine that comes back later joins the one that is on."""
        before = self._number
        if self._host:
            self._number = before + 1
            self._store.set("start", str(self._number))
        else:
            self._number = int(self._await("start", asked, _JOIN_SECONDS, lambda text: int(text) > before))
        name = f"start-{self._number}"
        return Place(name, self._endpoint, address=self._address, host=self._host, machines=self._machines)

    def agree(self, code: int, over: bool) -> tuple[int, bool]:
        """The common exit code of the start, and whether any machine wants no other one."""
        mine = json.dumps({"code": code, "over": over})
        try:
            turn = self._store.add(f"{self._number}/count", 1)
            self._store.set(f"{self._number}/word/{turn}", mine)
            if self._host:
                told = self._collect()
                self._store.set(f"{self._number}/decision", json.dumps(told))
                self._linger()
            else:
                told = json.loads(self._await(f"{self._number}/decision", (), _END_SECONDS, bool))
                self._store.add(f"{self._number}/heard", 1)
        except (RuntimeError, FaultError) as error:  # the machine that decides is gone: nobody to start again with
            _say(f"the launcher at {self._endpoint} does not answer any more ({error})")
            return (code or EXIT_FAULT), True
        return int(told["code"]), bool(told["over"])

    def _collect(self) -> dict[str, Any]:
        deadline = time.monotonic() + _END_SECONDS
        while self._count("count") < self._machines and time.monotonic() < deadline:
            time.sleep(0.1)
        heard = self._count("count")
        if heard < self._machines:
            _say(f"{self._machines - heard} of {self._machines} machines gave no word of this start")
        words = [json.loads(self._store.get(f"{self._number}/word/{turn}")) for turn in range(1, heard + 1)]
        codes = [word["code"] for word in words]
        failed = [code for code in codes if code not in (0, EXIT_STOPPED)]
        failed.sort(key=lambda code: code not in (EXIT_USER, EXIT_GUARD))  # 75 is also a machine's that lost the others
        common = common_code(failed, stopped=EXIT_STOPPED in codes)
        return {"code": common, "over": any(word["over"] for word in words)}

    def _linger(self) -> None:
        """The store ends with this process: let the others hear the decision."""
        deadline = time.monotonic() + 10
        while self._count("heard") < self._count("count") - 1 and time.monotonic() < deadline:
            time.sleep(0.05)

    def _count(self, kind: str) -> int:
        return self._store.add(f"{self._number}/{kind}", 0)

    def _await(self, key: str, asked: Sequence[str], seconds: float, good: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not asked:
            if self._store.check([key]) and good(text := self._store.get(key).decode()):
                return text
            time.sleep(0.1)
        if asked:
            raise StopAsked
        raise FaultError(f"no word from {self._endpoint} within {seconds:.0f} s", where=_ENDPOINT)


class StopAsked(Exception):  # noqa: N818 - it is an event, not an error
    """A launcher was asked to stop while it waited for the others."""


def machines(asked: Sequence[str], environment: Mapping[str, str] = os.environ) -> OneMachine | Machines:
    """This machine, or this one of several (MF_NNODES, MF_RDZV_ENDPOINT); raises UserError, FaultError, StopAsked."""
    text, endpoint = environment.get(_NODES, "1"), environment.get(_ENDPOINT, "")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{_NODES} = {text!r} is not a number of machines, 1 or more", where="environment")
    if int(text) == 1:
        return OneMachine()
    if not endpoint:
        raise UserError(
            f"{_NODES} = {text}, but the machines have no meeting point",
            where="environment",
            remedy=f"Set {_ENDPOINT}=HOST:PORT on all of them; HOST is one of them, PORT is free there.",
        )
    return Machines(int(text), endpoint, asked)


def number_of_machines(environment: Mapping[str, str] = os.environ) -> int:
    """MF_NNODES, before anything is started; 1 where it is no number, which `machines` refuses."""
    text = environment.get(_NODES, "1")
    return int(text) if text.isdecimal() and int(text) else 1


def _parse(endpoint: str) -> tuple[str, int]:
    host, colon, port = endpoint.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{_ENDPOINT} = {endpoint!r} is not HOST:PORT", where="environment")
    return host.strip("[]"), int(port)


def _resolve(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"the host of {_ENDPOINT} is not known: {host} ({error})", where="environment") from error


def _is_own(address: str) -> bool:
    """Only an address of this machine can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _own_address(peer: str, port: int) -> str:
    """The address of this machine on the way to `peer`."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, port))
        return str(probe.getsockname()[0])


def _open_store(address: str, port: int, asked: Sequence[str]) -> tuple[bool, TCPStore]:
    """(whether it is held here, the store)."""
    from torch.distributed import TCPStore

    if _is_own(address):
        try:
            return True, TCPStore(address, port, is_master=True, multi_tenant=True, wait_for_workers=False)
        except RuntimeError:
            pass  # the port is taken: by another launcher on this machine, or by a stranger
    said, deadline = False, time.monotonic() + _JOIN_SECONDS
    while time.monotonic() < deadline and not asked:
        try:
            with socket.create_connection((address, port), timeout=2):
                pass
            return False, TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        except OSError:
            if not said:
                _say(f"waiting for the machine that holds {address}:{port}")
            said = True
            time.sleep(1)
        except RuntimeError as error:
            raise UserError(
                f"what listens at {address}:{port} is no launcher of ours",
                where=_ENDPOINT,
                remedy="Choose a port that is free there.",
            ) from error
    if asked:
        raise StopAsked
    raise FaultError(f"nothing listens at {address}:{port} after {_JOIN_SECONDS:.0f} s", where=_ENDPOINT)


def _say(text: str) -> None:
    print(f"launch/local.sh: {text}", file=sys.stderr)
