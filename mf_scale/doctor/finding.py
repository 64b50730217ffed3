"""What a check found: one line of the doctor's page, and what a problem means for a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mf_scale.errors import EXIT_FAULT, EXIT_USER, FaultError, UserError

OK, WARNING, PROBLEM = "ok", "warning", "problem"
EXIT_PROBLEM = 1
_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    check: str
    """Which check says it."""
    level: str
    """ok, warning (a job goes on) or problem (it would not, or not well)."""
    text: str
    remedy: str = ""
    fault: bool = False
    """Of a problem: the surroundings' and nobody's mistake, so that another try, later or elsewhere, may do."""
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers behind the sentence, JSON values."""


def refused(check: str, error: UserError) -> Finding:
    """What training would refuse for the same reason, as a problem."""
    where = f" ({error.where})" if error.where not in ("", check) else ""
    return Finding(check, PROBLEM, f"{error.what}{where}", error.remedy, fault=isinstance(error, FaultError))


def looked(check: str, look: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """What `look` finds; a mistake it raises is a problem, any other error a warning: a check must not end the page."""
    try:
        return list(look())
    except UserError as error:
        return [refused(check, error)]
    except Exception as error:
        told = " ".join(f"{type(error).__name__} {error}".split())[:300]
        return [Finding(check, WARNING, f"this could not be looked at: {told}", "With --debug the traceback is shown.")]


def exit_code(findings: Sequence[Finding], *, in_job: bool = False) -> int:
    """0 without a problem, else 1; in a job 2 where a person must mend something, 75 where another try may help."""
    problems = [finding for finding in findings if finding.level == PROBLEM]
    if not problems:
        return 0
    if not in_job:
        return EXIT_PROBLEM
    return EXIT_FAULT if all(finding.fault for finding in problems) else EXIT_USER


def some(names: Sequence[object], *, shown: int = _SHOWN) -> str:
    """`a, b, c, d and 3 more`."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, one in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            told = f"{count / one:.1f}".removesuffix(".0") if count < 100 * one else f"{count / one:,.0f}"
            return f"{told} {unit}"
    return f"{count:.0f} bytes"
