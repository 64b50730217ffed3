"""`mf-scale status`: what runs are doing, from their directories; SLURM is asked where it can be."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from mf_scale.commands.arguments import add_command
from mf_scale.errors import UserError

if TYPE_CHECKING:
    from typing import Any

    from mf_scale.tracking.status import RunStatus

QUEUE_SECONDS = 5.0
"""A controller that answers later is not asked again."""
_CLEAR = "\x1b[H\x1b[2J\x1b[3J"


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "status", "what runs are doing: steps, speed, restarts, work lost", _run)
    command.add_argument("runs", nargs="+", metavar="RUN", help="run directory; several give a table")
    command.add_argument("--json", action="store_true", help="every number, one JSON object a run and line")
    command.add_argument("--watch", type=_seconds, metavar="SECONDS", help="again and again, until Ctrl-C")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.rundir import RunDir, existing_run
    from mf_scale.tracking.state import NOT_STARTED
    from mf_scale.tracking.status import run_status

    runs = [RunDir(existing_run(path)) for path in options.runs]
    terminal = sys.stdout.isatty()
    while True:
        queue = Queue()
        statuses = [run_status(run, queue=queue.ask) for run in runs]
        if len(statuses) == 1 and statuses[0].state.word == NOT_STARTED:
            raise UserError(
                "no run was started in this directory: it holds no metrics.jsonl, launches.jsonl or lock",
                where=statuses[0].run,
                remedy="Name a run directory that `mf-scale train` wrote.",
            )
        text = "\n".join(as_json(status) for status in statuses) if options.json else _text(statuses, terminal)
        clear = _CLEAR if options.watch and terminal and not options.json else ""
        print(f"{clear}{text}", flush=True)
        if options.watch is None:
            return 0
        try:
            time.sleep(options.watch)
        except KeyboardInterrupt:
            return 0


def as_json(status: RunStatus) -> str:
    """One line with every number; null: not known."""
    told = asdict(status)
    for start in told["starts"]:
        del start["commits"]  # only to tell what lost steps took
    return json.dumps(told, ensure_ascii=False)


def _text(statuses: list[RunStatus], terminal: bool) -> str:
    from mf_scale.tracking.status_text import page, table

    colour = terminal and "NO_COLOR" not in os.environ
    return page(statuses[0], colour=colour) if len(statuses) == 1 else table(statuses, colour=colour)


class Queue:
    """Asks SLURM for jobs; once it does not answer it is left alone."""

    def __init__(self) -> None:
        self._silent = False

    def ask(self, job: str) -> str | None:
        """ "STATE REASON" of a job, "" where SLURM does not know it (any more), None where nothing answers."""
        if self._silent:
            return None
        command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %r"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=QUEUE_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            self._silent = True
            return None
        if done.returncode == 0:
            return done.stdout.strip().partition("\n")[0]
        if "Invalid job id" in done.stderr:
            return ""
        self._silent = True
        return None
