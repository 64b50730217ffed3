"""`mf-scale report`: the page of a run."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import add_command


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "report", "write the page of a run: curves, tables, pictures", _run)
    command.add_argument("run", metavar="RUN", help="run directory")


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.evaluation.results import run_table
    from mf_scale.rundir import RunDir, existing_run
    from mf_scale.tracking.metrics import read_metrics
    from mf_scale.tracking.report import headline, write_report
    from mf_scale.tracking.status import run_status

    run = RunDir(existing_run(options.run))
    page = write_report(run)
    for card in headline(read_metrics(run.metrics), [], run_status(run)):
        print(f"{card['name']:<22}{card['value']}")
    print(run_table(run))
    print(f"report: {page}")
    return 0
