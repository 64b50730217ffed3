"""The W&B client, run as a module in a process of its own: reads lines from standard input and carries them out.

The only import of wandb. Every exception is written to the log and contained; the exit code is the number of lines that
failed. Lines: open, row, summary, evaluation, alert, finish (wandb_run.py, wandb_sync.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import IO, Any

from mf_scale.rundir import RunDir
from mf_scale.tracking.wandb_tables import evaluation_overlays, evaluation_tables, mask_names
from mf_scale.tracking.wandb_values import STEP

TOLD = "furthest-step"
"""File in RUN/wandb: the furthest step that the run of the directory was told."""
MASK_CLASSES = "mask-classes.json"
"""File in RUN/wandb: the classes that masks tell apart, of a vocabulary of more than these."""
INIT_SECONDS = 30.0
"""How long the service is tried before the run is written to files instead."""
FINISH_SECONDS = 60.0
_SILENT_END = "the training ended without a word: killed, or its node was lost"


def serve(lines: IO[bytes]) -> int:
    """Carry the lines out; the number of lines that failed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a stop request is the trainer's: it says when the run ends
    client = Client()
    failures = 0
    # The trainer may die without a word.
    last: list[dict[str, Any]] = [
        {"summary": {"run/state": "silent", "run/reason": _SILENT_END}},
        {"alert": {"title": "the run was aborted", "text": _SILENT_END, "level": "ERROR"}},
        {"finish": 1},
    ]
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # the trainer was killed while it told it
            failures += 1
            continue
        if "finish" in line:
            last = [line]
            break
        failures += not client.carry_out(line)
    watchdog = threading.Timer(last[-1].get("seconds", FINISH_SECONDS), os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    return failures + sum(not client.carry_out(line) for line in last)


class Client:
    """The W&B run inside this process."""

    def __init__(self) -> None:
        self._run: Any = None
        self._report = self._folder = Path()
        self._before = self._last = -1
        self._keeps_told = False
        self.held_back = 0
        """Rows of steps that the run knows already: W&B's steps only grow."""

    def carry_out(self, line: dict[str, Any]) -> bool:
        """Do what one line says; False where it failed."""
        try:
            if "open" in line:
                self._open(line)
            elif self._run is None:
                return False
            elif "finish" in line:
                if self.held_back:
                    print(f"{self.held_back} rows of replayed steps were held back: mf-scale wandb-sync shows them")
                if line.get("preempting"):
                    self._run.mark_preempting()
                self._run.finish(exit_code=line["finish"])
            elif "alert" in line:
                self._run.alert(**line["alert"])
            elif "summary" in line:
                self._run.summary.update(line["summary"])
            elif "evaluation" in line:
                self._log_evaluation(line["evaluation"], line["at"])
            else:
                self._log(line["row"], line["at"])
        except Exception:
            traceback.print_exc()
            return False
        return True

    def _open(self, line: dict[str, Any]) -> None:
        opened, config = line["open"], line["config"]
        self._report, self._folder = Path(line["report"]), RunDir(Path(opened["dir"])).wandb
        self._keeps_told = opened["resume"]
        run = _init(**opened, config=config)
        self._run = run
        if opened["resume"]:
            # Of a run that the service knows it is the service that tells.
            self._before = max(_number(self._folder / TOLD), int(getattr(run, "step", 0) or 0) - 1)
        with contextlib.suppress(AttributeError):
            run.define_metric(STEP, hidden=True)
            run.define_metric("*", step_metric=STEP)
            run.define_metric("validation/loss", step_metric=STEP, summary="min,last")

    def _log(self, values: dict[str, Any], at: int) -> None:
        if at <= self._before or at < self._last:
            self.held_back += 1
            return
        if self._keeps_told and at > self._last:
            # Before it is told: after a kill between the two a step is missing, and none stands twice.
            with contextlib.suppress(OSError):
                (self._folder / TOLD).write_text(f"{at}\n", encoding="utf-8")
        self._last = at
        self._run.log(values, step=at)

    def _log_evaluation(self, name: str, at: int) -> None:
        """Tables and pictures of RUN/report/NAME."""
        results = json.loads((self._report / Path(name).name).read_text(encoding="utf-8"))
        if results.get("step") != at:
            print(f"the evaluation of step {at} was replaced before it was told: mf-scale wandb-sync has its numbers")
            return
        self._log({STEP: at, **self._shown(results, f"evaluation/{results['split']}")}, at)

    def _shown(self, results: dict[str, Any], prefix: str) -> dict[str, Any]:
        import wandb

        tables = {
            f"{prefix}/{table.name}": wandb.Table(columns=[*table.columns], data=table.rows)
            for table in evaluation_tables(results)
        }
        file = self._folder / MASK_CLASSES
        known = json.loads(file.read_text()) if self._keeps_told and file.is_file() else []
        overlays, apart = evaluation_overlays(results, self._report, known)
        if self._keeps_told and len(apart) < len(results["class_names"]) and apart != known:
            file.write_text(json.dumps(apart))
        names = mask_names(results["class_names"], apart)
        pictures = [
            wandb.Image(
                str(one.image),
                caption=one.caption,
                masks={title: {"mask_data": m, "class_labels": names} for title, m in one.masks.items()} or None,
            )
            for one in overlays
        ]
        return {**tables, **({f"{prefix}/pictures": pictures} if pictures else {})}


def _init(*, modes: list[str], dir: str, id: str, project: str, name: str, resume: bool, config: dict[str, Any]) -> Any:
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
                resume="allow" if resume else None,
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, disable_code=True, init_timeout=INIT_SECONDS
                ),
            )
        except Exception:
            traceback.print_exc()
            with contextlib.suppress(Exception):
                wandb.teardown()  # its service still holds the id for the run that did not come to be
    raise RuntimeError(f"wandb.init worked in none of the modes {modes}")


def _number(file: Path) -> int:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return -1


if __name__ == "__main__":
    sys.exit(min(serve(sys.stdin.buffer), 100))
