"""Clocks of the ranks' nodes: read at the same moments, behind a barrier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mf_scale.cluster.probe import SKEW_SECONDS
from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding

CHECK = "clocks"
_NOTED = 1.0
"""Seconds from which it is said; a barrier lets ranks go some milliseconds apart."""


def judge_clocks(reports: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """reports: {rank, host, collectives: {"clocks": [...]}} of all ranks, in their order."""
    looked = [report for report in reports if report.get("collectives")]
    if len(looked) < 2:
        return []
    mine = looked[0]["collectives"]["clocks"]
    ahead = {
        report["rank"]: median(a - b for a, b in zip(report["collectives"]["clocks"], mine, strict=True))
        for report in looked
    }
    worst = max(looked, key=lambda report: abs(ahead[report["rank"]]))
    off = ahead[worst["rank"]]
    details = {"seconds": off, "host": worst["host"]}
    if abs(off) < _NOTED:
        return [Finding(CHECK, OK, f"within {max(abs(off), 0.001):.3f} s of each other", details=details)]
    apart = f"{abs(off):.1f} s {'ahead of' if off > 0 else 'behind'}"
    what = f"the clock of {worst['host']} is {apart} that of {looked[0]['host']}"
    remedy = "Have the nodes' clocks set (NTP): deadlines and the times of files depend on them."
    return [Finding(CHECK, PROBLEM if abs(off) > SKEW_SECONDS else WARNING, what, remedy, details=details)]
