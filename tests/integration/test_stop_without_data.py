"""A stop while storage does not answer: the ranks give up waiting, save and leave."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.integration.program import Run

pytestmark = pytest.mark.integration


class Store(ThreadingHTTPServer):
    """Ranges of the files of a folder, until it falls silent: then it takes requests and never answers."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.answers = folder, threading.Event()
        self.answers.set()
        self.kept_waiting = 0


class Answer(BaseHTTPRequestHandler):
    server: Store

    def do_GET(self) -> None:
        if not self.server.answers.is_set():
            self.server.kept_waiting += 1
        self.server.answers.wait()
        data = (self.server.folder / self.path.lstrip("/")).read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        body = data[int(found[1]) : int(found[2]) + 1] if found else data
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {found[1]}-{int(found[1]) + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(packed: Path) -> Iterator[Store]:
    pytest.importorskip("aiohttp", reason="reading http needs the extra mf_scale[http]")
    server = Store(packed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.answers.set()
    server.shutdown()
    server.server_close()


def test_a_stop_does_not_wait_for_storage_that_hangs(tmp_path: Path, packed: Path, store: Store) -> None:
    run = Run(tmp_path / "run", packed)
    source = f"data.train=http://127.0.0.1:{store.server_port}/train"
    settings = ["train.steps=4000", "data.workers=2", "data.block_samples=2", "data.val=null", source]
    child = subprocess.Popen(
        run.command(*settings, "checkpoint.every_steps=0"), stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while run.last_step() < 2:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        store.answers.clear()
        before = -1
        while run.last_step() != before or not store.kept_waiting:  # what was read ahead is used up
            assert child.poll() is None and time.monotonic() < deadline
            before = run.last_step()
            time.sleep(2)
        asked = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == 85
        assert time.monotonic() - asked < 10, "a request that nobody answers times out after 300 s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    stop = next(r for r in run.records() if r["event"] == "stop")
    assert stop["reason"] == "SIGTERM" and stop["step"] == run.last_step()
    assert run.state(stop["step"])["step"] == stop["step"]
    store.answers.set()
    done = run.train(*settings, f"train.steps={stop['step'] + 3}")
    assert done.returncode == 0, done.stderr
    assert list(run.series("keys", "keys")) == list(range(1, stop["step"] + 4))
