"""Weights & Biases, kept where it can do no harm: the client runs in a child process of its own.

The trainer puts values into a bounded queue; a daemon thread writes them, one JSON line each, into the child's
standard input; the child (`python -m mf_scale.tracking.wandb_run`) holds the only import of wandb. A client that
raises, hangs or is missing therefore costs lost W&B lines, counted and told at the end, and never the run: no
exit hook, no thread and no environment variable of the client lives in the trainer or in its loader workers.
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
import traceback
from collections.abc import Mapping
from typing import IO, Any

from mf_scale.config.schema import TrackingConfig
from mf_scale.errors import UserError
from mf_scale.rundir import RunDir, write_atomically

QUEUE_LINES = 1000
"""Lines waiting for the client at most; more are dropped and counted."""
CLIENT_LOG = "client.log"
"""File in RUN/wandb that holds what the client printed and raised."""


class WandbRun:
    """One W&B run a run directory, gone on with by every process that resumes it. No method raises or waits."""

    def __init__(
        self, config: TrackingConfig, run: RunDir, settings: Mapping[str, Any], *, queue_lines: int = QUEUE_LINES
    ) -> None:
        """Start the client in the background; `settings` is the effective configuration, shown by W&B."""
        self.dropped = 0
        self.log_file = run.wandb / CLIENT_LOG
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue(queue_lines)
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        if config.wandb == "disabled":
            return
        try:
            self._put({"open": _run_settings(config, run), "config": _plain(settings)})
            self._child = _start_client(run)
        except (OSError, TypeError, ValueError, UserError):
            self.dropped += 1
            return
        self._thread = threading.Thread(target=self._feed, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the values of one step (steps must not decrease); dropped and counted when the client is behind."""
        if self._thread is not None:
            self._put({"step": int(step), "log": _plain(values)})

    def alert(self, title: str, text: str) -> None:
        """Send an alert, which W&B passes on by mail or chat as its user has set it."""
        if self._thread is not None:
            self._put({"alert": {"title": title, "text": text}})

    def finish(self, exit_code: int = 0, timeout: float = 15.0, *, preempting: bool = False) -> str | None:
        """End the run within `timeout` seconds; a sentence on what W&B did not get, None when all is well.

        `preempting` marks a run that stops because its node is taken away and that will go on.
        """
        if self._child is None or self._thread is None:
            return None if not self.dropped else f"W&B could not be started; see {self.log_file}"
        deadline = time.monotonic() + timeout
        with contextlib.suppress(queue.Full):
            self._lines.put({"finish": exit_code, "preempting": preempting}, timeout=timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        child, self._thread = self._child, None
        try:
            failed = child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(child)
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
            _kill(child)

    def _put(self, line: dict[str, Any]) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def _feed(self) -> None:
        """Body of the daemon thread: queue -> pipe, until the finish line or a broken pipe."""
        assert self._child is not None and self._child.stdin is not None
        with contextlib.suppress(OSError), self._child.stdin as pipe:
            line: dict[str, Any] = {}
            while "finish" not in line:
                line = self._lines.get()
                pipe.write(json.dumps(line, default=str).encode() + b"\n")
                pipe.flush()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's own types, numbers of numpy and torch included."""
    return {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}


def _run_settings(config: TrackingConfig, run: RunDir) -> dict[str, Any]:
    online = config.wandb == "online" or (config.wandb == "auto" and bool(os.environ.get("WANDB_API_KEY")))
    return {
        "dir": str(run.path),
        "id": _run_id(run),
        "project": config.project,
        "name": config.name or run.path.resolve().name,
        "modes": ["online", "offline"] if online else ["offline"],
    }


def _run_id(run: RunDir) -> str:
    """The W&B id of this run directory, made once."""
    file = run.wandb / "run-id"
    if not file.is_file():
        run.wandb.mkdir(parents=True, exist_ok=True)
        write_atomically(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8").strip()


def _start_client(run: RunDir) -> subprocess.Popen[bytes]:
    quiet = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "PYTHONUNBUFFERED": "1"}
    with (run.wandb / CLIENT_LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mf_scale.tracking.wandb_run"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, **quiet},
            start_new_session=True,
        )


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the client and what it started in its session."""
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(1.0)


# What follows runs in the child.

_FINISH_SECONDS = 60.0


def serve(lines: IO[bytes]) -> int:
    """Carry the lines out; the number of lines that failed. Every exception is written to the log and contained."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a stop request is the trainer's: it says when the run ends
    client = _Client()
    failures = 0
    finish = {"finish": 1}  # the trainer died without a word
    for text in lines:
        line = json.loads(text)
        if "finish" in line:
            finish = line
            break
        failures += not client.carry_out(line)
    watchdog = threading.Timer(_FINISH_SECONDS, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    return failures + (not client.carry_out(finish))


class _Client:
    """The W&B run inside the child."""

    def __init__(self) -> None:
        self._run: Any = None

    def carry_out(self, line: dict[str, Any]) -> bool:
        """Do what one line says; False where it failed."""
        try:
            if "open" in line:
                self._run = _open(**line["open"], config=line["config"])
            elif self._run is None:
                return False
            elif "finish" in line:
                if line.get("preempting"):
                    self._run.mark_preempting()
                self._run.finish(exit_code=line["finish"])
            elif "alert" in line:
                self._run.alert(**line["alert"])
            else:
                self._run.log(line["log"], step=line["step"])
        except Exception:
            traceback.print_exc()
            return False
        return True


def _open(*, modes: list[str], dir: str, id: str, project: str, name: str, config: dict[str, Any]) -> Any:
    """wandb.init in the first mode that works."""
    import wandb

    for mode in modes:
        try:
            return wandb.init(
                project=project,
                name=name,
                id=id,
                dir=dir,
                config=config,
                resume="allow",
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, disable_code=True, init_timeout=30
                ),
            )
        except Exception:
            traceback.print_exc()
    raise RuntimeError(f"wandb.init worked in none of the modes {modes}")


if __name__ == "__main__":
    sys.exit(min(serve(sys.stdin.buffer), 100))
