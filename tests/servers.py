"""Real servers for tests, each in a process of its own on a port the system chose: nginx, S3 (moto), Google storage."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
START_SECONDS = 60
NGINX_CONFIG = """
daemon off;
master_process off;
error_log {folder}/error.log;
pid {folder}/nginx.pid;
events {{ worker_connections 64; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  gzip on; gzip_types *; gzip_min_length 0;
  {http}
  server {{
    listen 127.0.0.1:{port}{tls};
    root {root};
    {server}
  }}
}}
"""
"""One process only: a master that is killed leaves its workers behind."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def running(command: list[str], port: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, from when it listens; killed at the end."""
    with tempfile.TemporaryFile() as said:  # not a pipe: nobody would empty it
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=said)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    pytest.fail(f"{command[0]} did not start: {said.read().decode()[-2000:]}")
                time.sleep(0.05)
            yield process
        finally:
            process.kill()
            process.wait(timeout=30)


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def nginx(root: Path, folder: Path, port: int, *, server: str = "", http: str = "", tls: str = "") -> Iterator[str]:
    """A real nginx that serves `root` from `folder`; yields its url. `server`, `http`, `tls`: directives."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    folder.mkdir(exist_ok=True)
    config = folder / "nginx.conf"
    text = NGINX_CONFIG.format(
        folder=folder,
        root=root,
        port=port,
        server=f"{tls}\n{server}",
        http=http,
        tls=" ssl" if tls else "",
    )
    config.write_text(text)
    with running([str(NGINX), "-e", f"{folder}/error.log", "-p", str(folder), "-c", str(config)], port):
        yield f"http{'s' if tls else ''}://localhost:{port}"


@contextlib.contextmanager
def s3_server(**environment: str) -> Iterator[str]:
    """moto's server; yields its endpoint."""
    pytest.importorskip("moto", reason="the S3 server of the tests is moto")
    port = free_port()
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, **environment):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def gs_server() -> Iterator[str]:
    """gcp-storage-emulator; yields its endpoint."""
    pytest.importorskip("gcp_storage_emulator", reason="the Google storage of the tests is gcp-storage-emulator")
    port = free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    with running([*command, "--in-memory"], port):
        yield f"http://127.0.0.1:{port}"


class RangeHandler(BaseHTTPRequestHandler):
    """Answers ranges of `data`, whatever file is asked for; `answer` says how, for servers that do otherwise."""

    data = b""
    asked: ClassVar[list[tuple[int, int]]] = []
    """(first byte, bytes) of every request for a range."""

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(self.data))
        self.asked.append((start, stop - start))
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # clients may leave early
            self.answer(start, min(stop, len(self.data)))

    def answer(self, start: int, stop: int) -> None:
        self.begin(206, stop - start, {"Content-Range": f"bytes {start}-{stop - 1}/{len(self.data)}"})
        self.wfile.write(self.data[start:stop])

    def begin(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server of this process, for answers that no decent server gives; yields its url."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def cutting_proxy(target: str, allowed: Callable[[int], int | None]) -> Iterator[str]:
    """Stands before the server at `target` and breaks connection n (from 0) after `allowed(n)` bytes; None: never."""
    host, port = target.rpartition("/")[2].rsplit(":", 1)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        number = 0
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client, allowed(number)), daemon=True).start()
            number += 1

    def serve(client: socket.socket, budget: int | None) -> None:
        with client, socket.create_connection((host, int(port))) as server:
            threading.Thread(target=pump, args=(client, server, None), daemon=True).start()
            pump(server, client, budget)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def pump(source: socket.socket, sink: socket.socket, budget: int | None) -> None:
    """Bytes from one socket to another until they end or `budget` of them have passed; then both are closed."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data if budget is None else data[:budget])
            budget = None if budget is None else budget - len(data)
            if budget is not None and budget <= 0:
                break
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def send(url: str, data: bytes, method: str = "PUT", kind: str = "application/octet-stream") -> None:
    """Send bytes to a server."""
    request = urllib.request.Request(url, data, {"Content-Type": kind}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()
