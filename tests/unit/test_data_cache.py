"""The cache of remote shards: what is served from it, and what it does when the disk or another process misbehaves."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import pickle
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from mf_scale.config.schema import DataConfig
from mf_scale.data import cache as cache_module
from mf_scale.data import ledger, pages, pieces
from mf_scale.data.cache import CachedStorage, CacheSettings, Content, cache_settings, open_storage
from mf_scale.data.pieces import PARTIAL, PieceCache
from mf_scale.data.storage import Storage
from mf_scale.errors import UserError
from tests.servers import RangeHandler, http_server

pytest.importorskip("aiohttp", reason="reading http needs the extra mf_scale[http]")

DATA = np.random.Generator(np.random.PCG64(0)).bytes(10_500)
SHA, OTHER = "a" * 64, "b" * 64
SHARDS = {"a.tar": Content(SHA, len(DATA))}
PIECE, PAGE = 1000, 300
KEPT = PIECE + 4 * pages.WIDTH
"""Bytes of the file of a whole piece."""


class Server(RangeHandler):
    data = DATA
    asked: ClassVar[list[tuple[int, int]]] = []


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pages, "PAGE", PAGE)
    monkeypatch.setattr(pieces, "PIECE", PIECE)
    monkeypatch.setattr(cache_module, "PIECE", PIECE)
    monkeypatch.setattr(Server, "asked", [])


@pytest.fixture
def url():
    with http_server(Server) as found:
        yield found


@pytest.fixture
def settings(tmp_path):
    return CacheSettings(str(tmp_path / "cache"), 1 << 20)


def kept(settings: CacheSettings) -> dict[str, int]:
    """Bytes of the files of pieces, by name; partial ones too."""
    home = Path(settings.folder, pieces.HOME)
    return {f"{p.parent.name[0]}{p.name}": p.stat().st_size for p in sorted(home.glob("*/*"))}


def held(settings: CacheSettings) -> int:
    return int(Path(settings.folder, pieces.HOME, "ledger").read_text().split()[0])


def test_every_range_is_the_sources_and_is_fetched_once(url, settings):
    storage = pickle.loads(pickle.dumps(CachedStorage(url, settings, SHARDS)))  # noqa: S301 - our own object
    generator = np.random.Generator(np.random.PCG64(1))
    for _ in range(300):
        start, stop = sorted(generator.integers(0, len(DATA) + 1, 2).tolist())
        assert storage.read("a.tar", start, stop - start) == DATA[start:stop]
    fetched = np.zeros(len(DATA), int)
    for offset, size in Server.asked:
        assert offset % PIECE == 0 and (offset + size) % PIECE in (0, len(DATA) % PIECE)
        fetched[offset : offset + size] += 1
    assert fetched.max() == 1
    assert kept(settings) == {f"a{n:06d}": KEPT for n in range(10)} | {"a000010": 500 + 2 * pages.WIDTH}
    assert held(settings) == sum(kept(settings).values())
    Server.asked.clear()
    assert CachedStorage(url, settings, SHARDS).read("a.tar", 0, len(DATA)) == DATA and not Server.asked


def test_missing_neighbours_come_in_one_request(url, settings):
    storage = CachedStorage(url, settings, SHARDS)
    assert storage.read("a.tar", 4100, 10) == DATA[4100:4110]
    assert storage.read("a.tar", 1500, 6000) == DATA[1500:7500]
    assert Server.asked == [(4000, 1000), (1000, 3000), (5000, 3000)]


def test_reads_behind_the_end_and_of_other_files_go_to_the_source(url, settings):
    storage = CachedStorage(url, settings, SHARDS)
    assert storage.read("index.json", 10, 20) == DATA[10:30] and storage.read("a.tar", 5, 0) == b""
    assert not kept(settings) and storage.size("a.tar") == len(DATA)
    with pytest.raises(UserError, match=r"the range that it was asked for|ends at byte"):
        storage.read("a.tar", len(DATA) - 5, 10)


def test_a_shard_packed_again_is_never_served_stale(url, settings, monkeypatch):
    assert CachedStorage(url, settings, SHARDS).read("a.tar", 0, 100) == DATA[:100]
    monkeypatch.setattr(Server, "data", DATA[::-1])
    again = CachedStorage(url, settings, {"a.tar": Content(OTHER, len(DATA))})
    assert again.read("a.tar", 0, 100) == DATA[::-1][:100]


@pytest.mark.parametrize("sha256", ["../../../../etc/passwd", "A" * 64, "a" * 63, "", "a" * 64 + "\n"])
def test_an_index_names_no_other_folder(url, settings, sha256):
    with pytest.raises(UserError, match=r"no sha256 of a\.tar"):
        CachedStorage(url, settings, {"a.tar": Content(sha256, 1)})
    with pytest.raises(ValueError, match="is not a sha256"):
        PieceCache(settings).load(sha256, 0, 1, 0, 1)


@pytest.mark.parametrize("place", [3, 700, PIECE + 1, "short", "long", "swapped"])
def test_a_damaged_piece_is_fetched_again(url, settings, place):
    storage = CachedStorage(url, settings, SHARDS)
    storage.read("a.tar", 0, 2000)
    path = Path(settings.folder, pieces.HOME, SHA, "000000")
    content = bytearray(path.read_bytes())
    if place == "swapped":  # sound, but another's
        content = bytearray(path.with_name("000001").read_bytes())
    elif place == "short":
        del content[-1:]
    elif place == "long":
        content += b"x"
    else:
        content[place] ^= 1
    path.write_bytes(content)
    Server.asked.clear()
    assert storage.read("a.tar", 0, PIECE) == DATA[:PIECE] and Server.asked == [(0, PIECE)]
    assert storage.read("a.tar", 0, PIECE) == DATA[:PIECE] and len(Server.asked) == 1


def test_a_small_read_looks_at_its_pages_only(url, settings, monkeypatch):
    storage, real, seen = CachedStorage(url, settings, SHARDS), os.pread, []
    storage.read("a.tar", 0, 10)

    def pread(descriptor, size, offset):
        seen.append((size, offset))
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert storage.read("a.tar", 350, 100) == DATA[350:450]
    assert seen == [(PAGE, PAGE), (pages.WIDTH, PIECE + pages.WIDTH)]


def test_what_was_used_longest_ago_goes_first(url, settings):
    storage = CachedStorage(url, CacheSettings(settings.folder, 5 * KEPT), SHARDS)
    for number in (0, 1, 2, 3, 4):
        storage.read("a.tar", number * PIECE, 10)
        time.sleep(0.01)
    storage.read("a.tar", 0, 10)
    time.sleep(0.01)
    storage.read("a.tar", 5 * PIECE, 10)
    assert list(kept(settings)) == ["a000000", "a000003", "a000004", "a000005"]  # nine tenths of the bound
    assert held(settings) == 4 * KEPT


def test_files_are_listed_once_in_a_tenth_of_the_bound(url, settings, monkeypatch):
    listed = []
    real = PieceCache._files

    def files(cache):
        listed.append(1)
        return real(cache)

    monkeypatch.setattr(PieceCache, "_files", files)
    cache = PieceCache(CacheSettings(settings.folder, 40 * KEPT))
    for number in range(120):
        cache.store(SHA, number, DATA[:PIECE])
        assert sum(kept(settings).values()) <= 40 * KEPT
    assert len(listed) <= 1 + 80 / 4 + 1


def test_a_piece_above_the_bound_is_not_kept(url, settings):
    storage = CachedStorage(url, CacheSettings(settings.folder, PIECE), SHARDS)
    assert storage.read("a.tar", 0, 10) == DATA[:10] and not kept(settings)


def test_what_a_dead_writer_left_goes_and_what_a_living_one_writes_stays(settings):
    cache = PieceCache(settings)
    cache.store(SHA, 0, DATA[:PIECE])
    folder = Path(settings.folder, pieces.HOME, SHA)
    dead, living = (folder / f"000001.{name}{PARTIAL}" for name in ("1-1", "2-2"))
    dead.write_bytes(bytes(KEPT))
    with living.open("wb") as file:
        file.truncate(KEPT)
        ledger.hold(file.fileno())
        Path(settings.folder, pieces.HOME, "ledger").write_bytes(b"spoilt")
        cache.store(SHA, 2, DATA[:PIECE])
        assert list(kept(settings)) == ["a000000", "a000001.2-2.partial", "a000002"] and held(settings) == 3 * KEPT
    (folder.parent / "notes.txt").write_text("not ours")
    Path(settings.folder, pieces.HOME, "ledger").unlink()
    cache.store(SHA, 3, DATA[:PIECE])
    assert list(kept(settings)) == ["a000000", "a000002", "a000003"] and held(settings) == 3 * KEPT
    assert (folder.parent / "notes.txt").exists()


def test_a_piece_that_gets_its_name_while_room_is_made_is_counted(settings, monkeypatch):
    """Its writer waits: between the listing and the look at who still writes, neither name would be met."""
    cache, other = (PieceCache(CacheSettings(settings.folder, 5 * KEPT)) for _ in range(2))
    for number in range(4):
        cache.store(SHA, number, DATA[:PIECE])
    path, real, writers = cache._path(SHA, 4), PieceCache._files, []
    reserved = cache._reserve(path, KEPT)
    assert reserved

    def files(cache):
        found = list(real(cache))
        writers.append(threading.Thread(target=cache._write, args=(reserved, path, bytes(KEPT))))
        writers[0].start()
        writers[0].join(0.3)
        return found

    monkeypatch.setattr(PieceCache, "_files", files)
    other.store(SHA, 5, DATA[:PIECE])
    writers[0].join(10)
    assert list(kept(settings)) == ["a000002", "a000003", "a000004", "a000005"]
    assert held(settings) == 4 * KEPT


def test_a_piece_whose_writer_finds_no_lock_is_not_kept(settings, monkeypatch, caplog):
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.1)
    cache = PieceCache(settings)
    cache.store(SHA, 0, DATA[:PIECE])
    path = cache._path(SHA, 1)
    reserved = cache._reserve(path, KEPT)
    assert reserved
    with Path(settings.folder, pieces.HOME, "ledger").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache._write(reserved, path, bytes(KEPT))
    assert list(kept(settings)) == ["a000000"] and "lock was not to be had" in caplog.text


def test_what_was_taken_for_a_dead_writers_is_not_subtracted_twice(settings):
    """The disk refused; before its writer could say so another made room, and removed what it left."""
    cache = PieceCache(settings)
    for number in range(3):
        cache.store(SHA, number, DATA[:PIECE])
    reserved = cache._reserve(cache._path(SHA, 3), KEPT)
    assert reserved
    os.close(reserved[0])
    Path(settings.folder, pieces.HOME, "ledger").write_bytes(b"spoilt")
    PieceCache(settings).store(SHA, 4, DATA[:PIECE])
    cache._refused(OSError(errno.ENOSPC, "No space left on device"), reserved[1], KEPT)
    assert list(kept(settings)) == ["a000000", "a000001", "a000002", "a000004"] and held(settings) == 4 * KEPT


def test_a_full_disk_is_noted_once_for_all_and_read_around(url, settings, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    caches = [CachedStorage(url, settings, SHARDS) for _ in range(3)]
    others = [CachedStorage(url, settings, SHARDS)]
    caches[0].read("a.tar", 0, 10)

    def open_full(descriptor, *_args, **_more):
        os.close(descriptor)
        if others:  # the disk is full for another process while this one is about to write
            others.pop().read("a.tar", 4500, 10)
        return Path("/dev/full").open("r+b", buffering=0)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", open_full)
        for cache in caches:
            assert cache.read("a.tar", 1500, 10) == DATA[1500:1510]
            assert cache.read("a.tar", 5, 5) == DATA[5:10]
    assert [r.getMessage() for r in caplog.records] == [
        f"the cache {settings.folder}/{pieces.HOME} cannot be written: [Errno 28] No space left on device; "
        "nothing is stored, data is read from its source"
    ]
    assert list(kept(settings)) == ["a000000"] and held(settings) == KEPT
    Server.asked.clear()
    assert caches[1].read("a.tar", 2500, 10) == DATA[2500:2510]
    assert Server.asked == [(2500, 10)]  # not a whole piece, for nothing
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + pieces.PAUSE_SECONDS + 1)
    assert caches[1].read("a.tar", 2500, 10) == DATA[2500:2510] and "a000002" in kept(settings)


@pytest.mark.parametrize("fault", ["a file", "a file inside", "read only", "shared", "another's", "a link"])
def test_a_folder_that_cannot_be_used_is_noted_once(url, tmp_path, fault, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    folder = tmp_path / "cache"
    home = folder / pieces.HOME
    if fault == "a file":
        folder.write_text("")
    elif fault == "a file inside":
        folder.mkdir()
        home.write_text("")
        home.chmod(0o600)
    elif fault == "read only":
        real = os.open

        def refuse(path, flags, *rest, **more):
            if flags & os.O_CREAT:
                raise PermissionError(errno.EROFS, "Read-only file system")
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
    elif fault == "a link":
        folder.mkdir()
        (tmp_path / "elsewhere").mkdir()
        home.symlink_to(tmp_path / "elsewhere")
    else:
        home.mkdir(parents=True)
        home.chmod(0o777 if fault == "shared" else 0o700)
        if fault == "another's":
            monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    storage = CachedStorage(url, CacheSettings(str(folder), 1 << 20), SHARDS)
    for _ in range(3):
        assert storage.read("a.tar", 100, 10) == DATA[100:110]
    said = "cannot be written" if fault in ("a file", "read only") else "is not a folder that only this user can write"
    assert len(caplog.records) == 1 and f"the cache {home} {said}" in caplog.text
    assert not list(tmp_path.rglob("0*"))


def test_a_process_that_hangs_with_the_lock_delays_nobody_for_long(url, settings, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.1)
    storage = CachedStorage(url, settings, SHARDS)
    storage.read("a.tar", 0, 10)
    with Path(settings.folder, pieces.HOME, "ledger").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for _ in range(20):
            began = time.monotonic()
            assert storage.read("a.tar", 3000, 10) == DATA[3000:3010]
            assert storage.read("a.tar", 3, 10) == DATA[3:13]
    assert time.monotonic() - began < 0.09 and len(caplog.records) == 1
    assert "lock was not to be had" in caplog.text


def test_the_folder_may_go_while_it_is_used(url, settings):
    storage = CachedStorage(url, settings, SHARDS)
    storage.read("a.tar", 0, 10)
    Path(settings.folder, pieces.HOME).rename(Path(settings.folder, "gone"))
    assert storage.read("a.tar", 0, 10) == DATA[:10]
    assert list(kept(settings)) == ["a000000"] and held(settings) == KEPT


def test_only_sources_on_another_file_system_are_cached(tmp_path):
    config = DataConfig(cache_dir=str(tmp_path / "c"), cache_gib=0.5)
    settings = cache_settings(config)
    assert settings == CacheSettings(str(tmp_path / "c"), 1 << 29) and cache_settings(DataConfig()) is None
    assert type(open_storage(str(tmp_path), settings, SHARDS)) is Storage
    assert type(open_storage("http://localhost/x", settings, SHARDS)) is CachedStorage
    assert type(open_storage("http://localhost/x", None, SHARDS)) is Storage
    elsewhere = Path("/dev/shm")
    if elsewhere.is_dir() and elsewhere.stat().st_dev != tmp_path.stat().st_dev:
        assert type(open_storage(str(elsewhere), settings, SHARDS)) is CachedStorage
    assert not (tmp_path / "c").exists()
