"""Real processes that share a cache: the bytes stay right and the bound holds, whoever is killed when."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from mf_scale.data import pages
from mf_scale.data.ledger import Ledger
from mf_scale.data.pieces import HOME, PARTIAL
from tests.integration.cache_reader import DATA, PIECE
from tests.servers import RangeHandler, http_server

pytestmark = pytest.mark.integration
pytest.importorskip("aiohttp", reason="reading http needs the extra mf_scale[http]")

LIMIT = 1 << 20
"""A quarter of the two shards."""
ROOT = Path(__file__).parents[2]


class Server(RangeHandler):
    data = DATA
    asked: ClassVar[list[tuple[int, int]]] = []


@pytest.fixture
def url() -> Iterator[str]:
    with http_server(Server) as found:
        yield found


def start(url: str, folder: Path, seed: int, reads: int, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.integration.cache_reader", url, str(folder), str(LIMIT)]
    return subprocess.Popen(
        [*command, str(seed), str(reads), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sizes(folder: Path) -> dict[str, int]:
    found = {}
    for path in folder.glob(f"{HOME}/*/*"):
        try:
            found[f"{path.parent.name}/{path.name}"] = path.stat().st_size
        except FileNotFoundError:
            continue
    return found


def counted(folder: Path) -> int:
    """Bytes of all files, those that are being written too, while nobody adds, names or removes one."""
    if not (folder / HOME / "ledger").exists():
        return 0
    with Ledger(folder / HOME / "ledger").locked() as entry:
        assert entry is not None
        return sum(sizes(folder).values())


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=120)
    finally:
        process.kill()


def test_four_processes_read_rightly_and_keep_the_bound(url: str, tmp_path: Path) -> None:
    processes = [start(url, tmp_path, seed, 400) for seed in range(4)]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, counted(tmp_path))
        time.sleep(0.01)
    for process in processes:
        assert finish(process) == ("wrong 0\n", "") and process.returncode == 0
    assert 0.8 * LIMIT < most <= LIMIT
    assert not [name for name in sizes(tmp_path) if name.endswith(PARTIAL)]
    held = int((tmp_path / HOME / "ledger").read_text().split()[0])
    assert sum(sizes(tmp_path).values()) <= held <= LIMIT


def test_killed_writers_cost_nothing_but_their_piece(url: str, tmp_path: Path) -> None:
    dying = start(url, tmp_path, 0, 400, "die")
    finish(dying)
    assert dying.returncode == -9
    left = [name for name in sizes(tmp_path) if name.endswith(PARTIAL)]
    assert len(left) == 1 and sizes(tmp_path)[left[0]] == PIECE + pages.WIDTH
    moments = random.Random(0)
    for seed in range(6):
        process = start(url, tmp_path, seed, 10_000)
        time.sleep(1.0 + moments.random())
        process.kill()
        assert finish(process)[1] == ""
        assert sum(sizes(tmp_path).values()) <= LIMIT
    (tmp_path / HOME / "ledger").write_text("")  # what a dead machine may leave of it
    last = start(url, tmp_path, 9, 300)
    assert finish(last) == ("wrong 0\n", "")
    assert not [name for name in sizes(tmp_path) if name.endswith(PARTIAL)]
    assert sum(sizes(tmp_path).values()) == int((tmp_path / HOME / "ledger").read_text().split()[0]) <= LIMIT
