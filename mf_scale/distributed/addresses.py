"""Under which addresses other machines may reach this one. No torch here."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

CHOSEN = "MF_ADDRESS"
"""Environment variable with the name or number under which the other nodes reach this one: a site's choice."""
_SIOCGIFADDR = 0x8915
_MOST = 12


def own_addresses(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Names and numbers of this host in the order in which others should try them; MF_ADDRESS alone where it is set."""
    chosen = environment.get(CHOSEN)
    if chosen:
        return (chosen,)
    names = [environment.get("SLURMD_NODENAME", ""), socket.gethostname()]
    numbers = [*_numbers_4(), *_numbers_6()]
    numbers.sort(key=lambda number: number.startswith("127.") or number == "::1")  # of use within one machine only
    return tuple(dict.fromkeys(filter(None, [*names, *numbers])))[:_MOST]


def _numbers_4() -> Iterator[str]:
    """The first IPv4 address of every interface that has one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            yield socket.inet_ntoa(answer[20:24])


def _numbers_6(table: Path = Path("/proc/net/if_inet6")) -> Iterator[str]:
    """The IPv6 addresses that hold beyond their own link, and the loopback's."""
    try:
        lines = table.read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, _, scope, *_ = line.split()
        if scope in ("00", "10"):  # global, host
            yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(number))
