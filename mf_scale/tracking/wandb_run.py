"""Weights & Biases, kept where it can do no harm: the client runs in a child process of its own.

The trainer puts lines of metrics.jsonl into a bounded queue; a daemon thread turns them into W&B's values
(wandb_values.py) and writes them, one JSON line each, into the standard input of the child (wandb_client.py), which
holds the only import of wandb. A client that raises, hangs or is missing therefore costs lost W&B lines, counted and
told at the end, and never the run: no exit hook, no thread and no environment variable of the client lives in the
trainer or in its loader workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mf_scale.config.schema import TrackingConfig
from mf_scale.errors import UserError
from mf_scale.rundir import RunDir, write_atomically
from mf_scale.tracking.wandb_values import row, wandb_summary, wandb_values

QUEUE_LINES = 1000
"""Lines waiting for the client at most; more are dropped and counted."""
CLIENT_LOG = "client.log"
"""File in RUN/wandb that holds what the client printed and raised."""
RUN_ID = "run-id"
"""File in RUN/wandb that holds the W&B id of the run directory."""
Lines = list[dict[str, Any]]


class WandbRun:
    """One W&B run a run directory, gone on with by every process that resumes it. No method raises or waits."""

    def __init__(
        self, config: TrackingConfig, run: RunDir, settings: Mapping[str, Any], *, queue_lines: int = QUEUE_LINES
    ) -> None:
        """Start the client in the background; `settings` is what W&B shows as the configuration."""
        self.dropped = 0
        self.log_file = run.wandb / CLIENT_LOG
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue(queue_lines)
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        if config.wandb == "disabled":
            return
        try:
            opened = opening(config, run, online=wants_online(config), resume=True)
            self._lines.put_nowait({**opened, "config": dict(settings)})
            self._child = start_client(run)
        except (OSError, TypeError, ValueError, UserError, queue.Full):
            self.dropped += 1
            return
        self._thread = threading.Thread(target=self._feed, name="wandb", daemon=True)
        self._thread.start()

    def record(self, record: Mapping[str, Any]) -> None:
        """Send what W&B shows of a line of metrics.jsonl; dropped and counted when the client is behind."""
        self._put({"record": record})

    def evaluation(self, step: int, name: str) -> None:
        """Send the tables and pictures of RUN/report/NAME, the evaluation of `step`; the client reads the file."""
        self._put({"evaluation": name, "at": step})

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Send an alert (WARN, ERROR), which W&B passes on by mail or chat as its user has set it."""
        self._put({"alert": {"title": title, "text": text, "level": level}})

    def finish(self, exit_code: int = 0, timeout: float = 15.0, *, preempting: bool = False) -> str | None:
        """End the run within `timeout` seconds; a sentence on what W&B did not get, None when all is well.

        `preempting` marks a run that stops because its node is taken away and that will go on.
        """
        if self._child is None or self._thread is None:
            return None if not self.dropped else f"W&B could not be started; see {self.log_file}"
        deadline = time.monotonic() + timeout
        last = {"finish": exit_code, "preempting": preempting}
        # A client that is gone takes nothing any more: nobody waits for it.
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Full):
                self._lines.put(last, timeout=0.1)
                break
        self._thread.join(max(0.0, deadline - time.monotonic()))
        child, self._thread = self._child, None
        try:
            failed = child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            end_client(child)
            return f"W&B did not finish within {timeout:g} s and was left behind; see {self.log_file}"
        if failed or self.dropped:
            return (
                f"W&B did not get everything ({self.dropped} lines dropped, client exit {failed}); see {self.log_file}"
            )
        return None

    def abandon(self) -> None:
        """End the client at once and tell W&B nothing: the run goes on in another process."""
        child, self._child, self._thread = self._child, None, None
        if child is not None:
            end_client(child)

    def _put(self, line: dict[str, Any]) -> None:
        if self._thread is None:
            return  # there is no client, or it is over
        try:
            if self._thread.is_alive():
                self._lines.put_nowait(line)
                return
        except queue.Full:
            pass
        self.dropped += 1

    def _feed(self) -> None:
        """Body of the daemon thread: queue -> pipe, until the finish line or a broken pipe."""
        assert self._child is not None and self._child.stdin is not None
        with contextlib.suppress(OSError), self._child.stdin as pipe:
            line: dict[str, Any] = {}
            while "finish" not in line:
                line = self._lines.get()
                try:
                    told = b"".join(encoded(one) for one in client_lines(line))
                except Exception:  # whatever is wrong with a line, it is one line
                    self.dropped += 1
                    continue
                pipe.write(told)
                pipe.flush()


def client_lines(line: dict[str, Any]) -> Lines:
    """The client's lines for one of the queue: a line of metrics.jsonl becomes values, a summary, both or none."""
    record = line.get("record")
    if record is None:
        return [line]
    values, summary = wandb_values(record), wandb_summary(record)
    told: Lines = [{"row": row(record, values), "at": record["step"]}] if values else []
    return [*told, {"summary": summary}] if summary else told


def encoded(line: Mapping[str, Any]) -> bytes:
    """A line as the client reads it."""
    return json.dumps(line, default=str).encode() + b"\n"


def wants_online(config: TrackingConfig) -> bool:
    """Whether the service is to be tried: a key is there, or it was asked for."""
    return config.wandb == "online" or (config.wandb == "auto" and bool(os.environ.get("WANDB_API_KEY")))


def opening(
    config: TrackingConfig, run: RunDir, *, online: bool, resume: bool, id: str | None = None
) -> dict[str, Any]:
    """The client's first line, without the configuration to be shown. UserError, OSError where no id can be kept."""
    opened = {
        "dir": str(run.path),
        "id": id or run_id(run),
        "project": config.project,
        "name": config.name or run.path.resolve().name,
        "modes": ["online", "offline"] if online else ["offline"],
        "resume": resume,
    }
    return {"open": opened, "report": str(run.report)}


def run_id(run: RunDir) -> str:
    """The W&B id of this run directory, made once."""
    file = run.wandb / RUN_ID
    if not file.is_file():
        run.wandb.mkdir(parents=True, exist_ok=True)
        write_atomically(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8").strip()


def start_client(run: RunDir) -> subprocess.Popen[bytes]:
    """The child process; what it prints and raises goes to RUN/wandb/client.log."""
    quiet = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "PYTHONUNBUFFERED": "1"}
    # Logs, and the artifacts that tables become, would be staged in the home directory, whose quota is small.
    folder = Path(run.wandb).resolve()
    inside = {"WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder / "cache")}
    with (run.wandb / CLIENT_LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mf_scale.tracking.wandb_client"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**inside, **os.environ, **quiet},
            start_new_session=True,
        )


def end_client(child: subprocess.Popen[bytes]) -> None:
    """End the client and what it started in its session."""
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(1.0)
