"""Ranged reads: retried at the byte where they broke; nothing outside the source, nothing to a shell."""

from __future__ import annotations

import errno
import os
import pickle
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from mf_scale.data import storage as storage_module
from mf_scale.data.index import Index
from mf_scale.data.storage import Storage, StorageError, plain_name
from mf_scale.errors import FaultError, UserError

DATA = bytes(range(256)) * 64


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    return tmp_path


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.0)


def test_a_range_is_read(source):
    storage = pickle.loads(pickle.dumps(Storage(str(source))))  # noqa: S301 - our own object
    assert storage.read("a.tar", 100, 50) == DATA[100:150]
    assert storage.read_all("a.tar") == DATA
    assert storage.read("a.tar", 5, 0) == b""


def test_a_broken_read_goes_on_where_it_broke(source, monkeypatch):
    real, asked = os.pread, []

    def flaky(descriptor, size, offset):
        asked.append(offset)
        if len(asked) in (2, 3):
            raise OSError(errno.EIO, "broken")
        return real(descriptor, min(size, 1000), offset)

    monkeypatch.setattr(os, "pread", flaky)
    assert Storage(str(source)).read("a.tar", 10, 2500) == DATA[10:2510]
    assert asked == [10, 1010, 1010, 1010, 2010]


def test_a_lasting_fault_stops_the_run_with_its_place(source, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(StorageError, match=r"a\.tar at byte 7 failed 9 times.*broken") as caught:
        Storage(str(source)).read("a.tar", 7, 1)
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own object
    assert type(error) is StorageError and isinstance(error, FaultError) and error.exit_code == 75
    assert str(error) == str(caught.value) and str(source) in error.where and error.remedy


def test_missing_and_short_files_are_told(source):
    with pytest.raises(UserError, match=r"b\.tar cannot be read"):
        Storage(str(source)).read("b.tar", 0, 1)
    with pytest.raises(UserError, match="ends at byte 16384"):
        Storage(str(source)).read("a.tar", 16000, 1000)


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "file:///tmp", "ftp://host/x", "http:relative", "PIPE:id"])
def test_other_schemes_are_refused(url):
    with pytest.raises(UserError, match="are not read"):
        Index.open(url)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "b/a.tar", "", "..", ".hidden", "pipe:id", "a\\b", "a\n"])
def test_only_plain_names_are_read(source, name):
    with pytest.raises(UserError, match="not a plain file name"):
        plain_name(name)
    with pytest.raises(UserError):
        Storage(str(source / "sub")).read(name, 0, 1)


class DroppingServer(BaseHTTPRequestHandler):
    """Serves ranges of DATA; cuts the connection in the middle of every second answer."""

    answers = 0

    def do_GET(self):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(DATA))
        body = DATA[start:stop]
        type(self).answers += 1
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(DATA)}")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.answers % 2 else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


def test_a_server_that_drops_connections_delivers_all(monkeypatch):
    pytest.importorskip("aiohttp", reason="reading http needs the extra mf_scale[http]")
    monkeypatch.setattr(storage_module, "PIECE", 1000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), DroppingServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        storage = Storage(f"http://127.0.0.1:{server.server_port}/data")
        assert storage.read("a.tar", 50, 5000) == DATA[50:5050]
        assert DroppingServer.answers == 10
    finally:
        server.shutdown()
        server.server_close()


class StatusServer(BaseHTTPRequestHandler):
    """Answers each request with the next of `statuses`, the last one for ever."""

    statuses: ClassVar[list[int]] = []

    def do_GET(self):
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        body = DATA[:10] if status < 300 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    pytest.importorskip("aiohttp", reason="reading http needs the extra mf_scale[http]")
    server = ThreadingHTTPServer(("127.0.0.1", 0), StatusServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/data"
    server.shutdown()
    server.server_close()


ASK = {"read": lambda storage: storage.read("a.tar", 0, 10), "size": lambda storage: storage.size("a.tar")}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_a_refused_connection_is_a_fault_not_a_missing_file(ask):
    pytest.importorskip("aiohttp", reason="reading http needs the extra mf_scale[http]")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        with pytest.raises(StorageError, match=r"a\.tar .*9 times.*ClientConnectorError.*Cannot connect") as caught:
            ask(Storage(url))
        assert caught.value.where == url and "\n" not in str(caught.value)
        with pytest.raises(StorageError, match=r"index\.json for its size"):
            Index.open(url)


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_what_the_server_does_not_have_is_missing_at_once(server, ask, monkeypatch):
    monkeypatch.setattr(StatusServer, "statuses", [404])
    monkeypatch.setattr(Storage, "_wait", lambda *_: pytest.fail("it was tried again"))
    with pytest.raises(UserError, match=r"a\.tar cannot be read") as caught:
        ask(Storage(server))
    assert caught.value.exit_code == 2 and caught.value.where == server


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_a_server_in_trouble_is_asked_again(server, ask, monkeypatch):
    monkeypatch.setattr(StatusServer, "statuses", [503, 503, 503, 503, 200])
    assert ask(Storage(server)) in (DATA[:10], 10)
    monkeypatch.setattr(StatusServer, "statuses", [503])
    with pytest.raises(StorageError, match="503"):
        ask(Storage(server))
