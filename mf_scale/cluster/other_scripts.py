"""The commands of `python -m mf_scale.cluster` for launch/sweep.sh, evaluate.sh and pack.sh.

sweep-list     the runs of a grid, and the line that submits them
sweep-run      what one task of an array trains
sweep-summary  renew the table of a sweep; print it once every run is over
places         how many ranks the job has room for, for what runs on any number of them
again          whether a job without a run of its own is started again
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from mf_scale.cluster.again import start_again
from mf_scale.cluster.job import this_job
from mf_scale.cluster.layout import cpus_of_a_rank, room
from mf_scale.cluster.prepare import SHELL
from mf_scale.cluster.sweep import PART, choose, listing, this_task
from mf_scale.errors import UserError


def add(commands: Any) -> None:
    """Their arguments; each is called with its options and the words that are left."""
    for name, call in (("sweep-list", _list), ("sweep-run", _choose)):
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("--frozen", type=Path)
        command.set_defaults(call=call)
    command = commands.add_parser("sweep-summary", allow_abbrev=False)
    command.add_argument("sweep", type=Path)
    command.set_defaults(call=_summarize)
    commands.add_parser("places", allow_abbrev=False).set_defaults(call=_places)
    command = commands.add_parser("again", allow_abbrev=False)
    command.add_argument("--code", type=int, required=True)
    command.add_argument("--signals", default="")
    command.add_argument("--resumes", action="store_true")
    command.set_defaults(call=_again)


def _given(options: argparse.Namespace, rest: list[str]) -> tuple[str, Path, list[str]]:
    """The grid's word, the configuration (an earlier start's copy, if there is one) and the overrides."""
    named = [word for word in rest if not word.startswith("-") and "=" not in word]
    if len(named) != 2:
        raise UserError(
            f"a grid and a configuration are needed, not {' and '.join(named) or 'nothing'}",
            where="command line",
            remedy="The arguments are GRID CONFIG [key=value ...].",
        )
    overrides = [word for word in rest if word not in named and not word.startswith("-")]
    return named[0], options.frozen / "config.yaml" if options.frozen else Path(named[1]), overrides


def _list(options: argparse.Namespace, rest: list[str]) -> int:
    grid, config, overrides = _given(options, rest)
    print(listing(Path(grid), config, overrides, rest))
    return 0


def _choose(options: argparse.Namespace, rest: list[str]) -> int:
    grid, config, overrides = _given(options, rest)
    task, part = this_task(), os.environ.get(PART) == "1"
    chosen = choose(Path(grid), config, overrides, task, submitted=this_job().submitted, part=part)
    print(f"mf_scale: run {task.number} of the grid: {chosen.run.name}", file=sys.stderr)
    print(SHELL, chosen.shell([word for word in rest if word != grid]), sep="\n")
    return 0


def _summarize(options: argparse.Namespace, rest: list[str]) -> int:
    from mf_scale.cluster.summary import renew_summary

    text, over = renew_summary(options.sweep)
    if over:
        print(f"\n{options.sweep / 'summary.md'}:\n\n{text}")
    return 0


def _places(options: argparse.Namespace, rest: list[str]) -> int:
    job = this_job()
    places = room(job)
    print(SHELL, f"mf_nodes={len(places)}", f"mf_ranks={sum(places)}", f"mf_per_node={max(places)}", sep="\n")
    print(f"mf_cpus={cpus_of_a_rank(job, max(places))}")
    return 0


def _again(options: argparse.Namespace, rest: list[str]) -> int:
    """Prints `requeue` where the job script must ask for it."""
    job = this_job()
    signals = options.signals.split()
    again, why = start_again(options.code, signals, job.facts, job.start.restart, resumes=options.resumes)
    if why:
        print(f"mf_scale: {why}", file=sys.stderr)
    if again:
        print("requeue")
    return 0
