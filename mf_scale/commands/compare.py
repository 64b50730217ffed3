"""`mf-scale compare`: runs side by side."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import add_command


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "compare", "runs side by side: numbers, curves, what differs", _run)
    command.add_argument("runs", nargs="+", metavar="RUN", help="run directories, two or more")
    command.add_argument("--out", metavar="PAGE.html", help="write a page with curves and per-class differences too")


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    from mf_scale.rundir import RunDir, existing_run
    from mf_scale.tracking.report.compare import as_text, read_runs
    from mf_scale.tracking.report.compare_page import refuse_page, write_comparison

    out = Path(options.out) if options.out is not None else None
    if out is not None:
        refuse_page(out)
    runs = read_runs([RunDir(existing_run(path)) for path in options.runs])
    page = write_comparison(runs, out) if out is not None else None  # also where nobody reads what is printed
    print(as_text(runs))
    if page is not None:
        print(f"page: {page}")
    return 0
