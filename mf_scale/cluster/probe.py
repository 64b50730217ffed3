"""One look at every node before the ranks start: what each says of itself, and what is wrong with that.

A node that cannot start Python says so through the shell of `launch/job.sh`; the others run `python -m
mf_scale.cluster probe` once, without torch.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mf_scale.errors import FaultError, UserError
from mf_scale.fingerprint import code_digest

SKEW_SECONDS = 5.0
"""Clocks that differ by more make deadlines and the times of files lie."""
_SHARED_SECONDS = 10.0
"""A network file system may show a file that another node wrote some seconds later."""


def node_report(token: Path) -> dict[str, Any]:
    """What this node says: its clock, its code, whether it sees the file that the head node wrote."""
    return {
        "node": _name(),
        "time": time.time(),
        "code": code_digest(),
        "python": platform.python_version(),
        "where": str(Path(sys.modules["mf_scale"].__file__ or "").parent),
        "sees": _appears(token),
    }


def judge(
    lines: Iterable[str],
    nodes: Sequence[str],
    *,
    began: float,
    ended: float,
    run: Path,
    code: str,
    python: str,
    comes_back: bool,
) -> None:
    """Raise for the first thing that is wrong with what the nodes said between `began` and `ended` (Unix seconds).

    UserError: Python or the run directory is not to be seen on a node, clocks differ, code differs. FaultError: a node
    said nothing or stumbled, or (`comes_back`: this is not the first start) sees no more what it saw before; another
    start, later or on other nodes, may mend that.
    """
    mistake = FaultError if comes_back else UserError
    reports = [report for line in lines if (report := _read(line)) is not None]
    blind = [str(r["node"]) for r in reports if "missing" in r]
    if blind:
        raise mistake(
            f"{_some(blind)} cannot start {python}: the virtual environment is not visible there",
            where=f"job on {len(nodes)} nodes",
            remedy="Put it on a file system that all nodes share, or name one with MF_PYTHON.",
        )
    failed = [r for r in reports if "failed" in r]
    if failed:
        raise FaultError(
            f"{_some([str(r['node']) for r in failed])} cannot run the program with {python} (exit code "
            f"{failed[0]['failed']})",
            where=f"job on {len(nodes)} nodes",
            remedy="The lines above tell why.",
        )
    _judge_answers(reports, nodes)
    apart = [str(r["node"]) for r in reports if not r["sees"]]
    if apart:
        raise mistake(
            f"{_some(apart)} does not see what the head node wrote into the run directory",
            where=str(run),
            remedy="Choose a run_dir on a file system that all nodes share.",
        )
    _judge_clocks(reports, began, ended)
    _judge_code(reports, code)


def _judge_answers(reports: list[dict[str, Any]], nodes: Sequence[str]) -> None:
    if not reports:
        raise FaultError("srun could not ask the nodes", where="srun", remedy="The lines above tell why.")
    short = {name.partition(".")[0] for name in nodes}
    heard = {str(r["node"]).partition(".")[0] for r in reports}
    silent = sorted(short - heard)
    # Where hosts bear other names than SLURM's nodes only the number can be compared.
    if len(reports) < len(nodes):
        named = _some(silent) if heard & short else f"{len(nodes) - len(reports)} of {len(nodes)} nodes"
        raise FaultError(f"{named} did not answer", where="srun", remedy="`sinfo -R` tells what SLURM knows of it.")


def _judge_clocks(reports: list[dict[str, Any]], began: float, ended: float) -> None:
    for report in reports:
        late, early = float(report["time"]) - ended, began - float(report["time"])
        if max(late, early) > SKEW_SECONDS:
            off = f"{late:.0f} s ahead of" if late > 0 else f"{early:.0f} s behind"
            raise UserError(
                f"the clock of {report['node']} is {off} that of the head node",
                where="clocks",
                remedy="Have the nodes' clocks set (NTP): deadlines and the times of files depend on them.",
            )


def _judge_code(reports: list[dict[str, Any]], code: str) -> None:
    for what, mine in (("code", code), ("python", platform.python_version())):
        other = [r for r in reports if r[what] != mine]
        if other:
            kinds = Counter(str(r[what]) for r in other)
            raise UserError(
                f"{_some([str(r['node']) for r in other])} has another version of "
                f"{'the program' if what == 'code' else 'Python'} than the head node "
                f"({', '.join(kind[:12] for kind in kinds)} instead of {mine[:12]})",
                where=str(other[0]["where"]),
                remedy="Install the same one everywhere, or let the job use its frozen copy (without --live-code).",
            )


def _read(line: str) -> dict[str, Any] | None:
    try:
        report = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(report, dict) and (
        {"node", "missing"} <= report.keys()
        or {"node", "failed"} <= report.keys()
        or {"node", "time", "code", "python", "where", "sees"} <= report.keys()
    )
    return report if whole else None


def _name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _SHARED_SECONDS
    while not file.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _some(names: Sequence[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more nodes" if len(shown) > 4 else "")
