"""A sweep: the runs of a grid as the tasks of a SLURM array, one run directory each.

ROOT/                     the run_dir of the configuration
ROOT/NAME/                a run
ROOT/.sweep/ARRAY.json    the runs of an array, written by the first of its tasks: what a task was, it stays
ROOT/summary.md, .json    the table of all runs (summary.py)
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mf_scale.cluster.grid import Run, check_runs, read_grid
from mf_scale.errors import UserError
from mf_scale.rundir import disk_errors, read_json

RECORDS = ".sweep"
PART = "MF_SWEEP_PART"
_CLOCK_SECONDS = 5.0
"""The controller's clock and the file server's differ by as much at most."""


@dataclass(frozen=True)
class Task:
    """The place of a job in its array."""

    array: str
    number: int
    first: int
    last: int
    count: int
    """Tasks of the array."""


@dataclass(frozen=True)
class Chosen:
    """What one task trains."""

    root: Path
    run: Run
    overrides: tuple[str, ...]

    def shell(self, given: Sequence[str]) -> str:
        """Assignments for the job script; `given`: its own arguments without the grid."""
        return f"mf_sweep={shlex.quote(str(self.root))}\nmf_words=({shlex.join([*given, *self.overrides])})"


def this_task(environment: Mapping[str, str] = os.environ) -> Task:
    """The task this process belongs to; raises UserError outside of an array."""
    try:
        number, first, last, count = (int(environment[f"SLURM_ARRAY_TASK_{n}"]) for n in ("ID", "MIN", "MAX", "COUNT"))
        return Task(environment["SLURM_ARRAY_JOB_ID"], number, first, last, count)
    except (KeyError, ValueError) as error:
        raise UserError(
            "this job is no task of an array",
            where="environment",
            remedy="sbatch --array=0-N launch/sweep.sh GRID CONFIG; `bash launch/sweep.sh GRID CONFIG` tells N.",
        ) from error


def choose(file: Path, config: Path, overrides: Sequence[str], task: Task, *, submitted: float, part: bool) -> Chosen:
    """What a task trains; raises UserError where grid and array do not fit, or a run of the grid cannot be trained.

    submitted: Unix seconds at which the array was submitted, 0: unknown. part: fewer tasks than runs are meant.
    """
    recorded = _recorded(config, overrides, task.array)
    if recorded is None:
        if submitted and file.is_file() and file.stat().st_mtime > submitted + _CLOCK_SECONDS:
            when = time.strftime("%H:%M:%S on %Y-%m-%d", time.localtime(submitted))
            raise UserError(
                f"the grid changed after the array was submitted (at {when})", where=str(file), remedy="Submit again."
            )
        runs = read_grid(file)
        root = Path(check_runs(runs, file, config, overrides)).absolute()
        refuse_misfit(len(runs), task, file, part=part)
        _record(root, task.array, runs)
        recorded = root, _read_record(root, task.array)
    root, runs = recorded
    if task.number >= len(runs):
        refuse_misfit(len(runs), task, file, part=part)
    run = runs[task.number]
    return Chosen(root, run, (*run.overrides(), f"run_dir={json.dumps(str(root / run.name), ensure_ascii=False)}"))


def refuse_misfit(runs: int, task: Task, file: Path, *, part: bool) -> None:
    """Raise UserError where the array is not of the grid's size and nothing says that it is meant so."""
    right = f"Submit with --array=0-{runs - 1}"
    if task.last >= runs or task.number >= runs:
        raise UserError(
            f"the array has a task {task.last}, the grid {runs} runs, numbered from 0",
            where=str(file),
            remedy=f"{right}.",
        )
    plain = task.first == 0 and task.last + 1 == task.count  # tasks that begin elsewhere or leave some out are chosen
    if plain and task.count < runs and not part:
        raise UserError(
            f"the array has {task.count} tasks, the grid {runs} runs",
            where=str(file),
            remedy=f"{right} (%2: two at a time), or with {PART}=1 if the first {task.count} alone are meant.",
        )


def listing(file: Path, config: Path, overrides: Sequence[str], command: Sequence[str]) -> str:
    """The runs of a grid as a table, and the line that submits them; raises UserError."""
    runs = read_grid(file)
    root = check_runs(runs, file, config, overrides)
    keys = list(dict.fromkeys(key for run in runs for key in run.values))
    rows = [["", "run", *keys]]
    for number, run in enumerate(runs):
        rows.append([str(number), run.name, *(shown(run.values[key]) if key in run.values else "" for key in keys)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    submit = f"sbatch --array=0-{len(runs) - 1}%2 launch/sweep.sh {shlex.join(command)}"
    return "\n".join([*table, "", f"{len(runs)} runs in {root}. Two at a time:", f"  {submit}"])


def shown(value: object) -> str:
    """A value as a person writes it."""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def records(root: Path) -> list[Run]:
    """The runs of all arrays of a sweep, the oldest array's first, each once."""
    files = sorted((root / RECORDS).glob("*.json"), key=lambda file: (file.stat().st_mtime, file.name))
    return list({run.name: run for file in files for run in _read_record(root, file.stem)}.values())


def _recorded(config: Path, overrides: Sequence[str], array: str) -> tuple[Path, list[Run]] | None:
    from mf_scale.config.load import load_config

    root = Path(load_config(config, overrides).run_dir).absolute()
    return (root, _read_record(root, array)) if (root / RECORDS / f"{array}.json").is_file() else None


def _read_record(root: Path, array: str) -> list[Run]:
    return [Run(str(run["name"]), run["values"]) for run in read_json(root / RECORDS / f"{array}.json")["runs"]]


def _record(root: Path, array: str, runs: Sequence[Run]) -> None:
    """The first task's word stands: a link cannot replace a file."""
    assert re.fullmatch(r"\w+", array)
    file = root / RECORDS / f"{array}.json"
    made = file.with_name(f".{array}-{os.urandom(4).hex()}")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps({"runs": [{"name": run.name, "values": run.values} for run in runs]}, indent=1))
        try:
            os.link(made, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            made.replace(file)
            return
        made.unlink()
