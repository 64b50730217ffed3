"""Files that appear under their names whole or not at all, however many processes and hosts write into a folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

CHUNK = 8 << 20
"""Bytes read at once for a checksum."""
PARTIAL = re.compile(r".+\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.partial")
MINUTE, DAY = 60.0, 86400.0


def partial_path(final: Path) -> Path:
    """The name a file has while this process writes it."""
    return final.with_name(f"{final.name}.{_host()}.{os.getpid()}.partial")


def publish(partial: Path, final: Path) -> None:
    """Give a finished file its name, after its bytes have reached the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(final)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = partial_path(path)
    partial.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    publish(partial, path)


def file_checksum(path: Path) -> str:
    """sha256 of a local file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sweep_partials(folder: Path, *, finished: bool) -> None:
    """Remove what killed processes left behind; once a pack is `finished`, all partial shards.

    Processes of other hosts cannot be asked whether they live: what they left goes when it is a day old.
    """
    for path in folder.glob("*.partial"):
        try:
            idle = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue
        found = PARTIAL.fullmatch(path.name)
        if found is None:
            continue
        # A living process in another container of this host is not seen here, but its file is not quiet either.
        dead = found["host"] == _host() and not _alive(int(found["pid"])) and (finished or idle > MINUTE)
        if dead or idle > DAY or (finished and ".tar." in path.name):
            path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
