"""The page of the doctor, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap

from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding, exit_code, some

MARKS = {OK: "✓", WARNING: "!", PROBLEM: "✗"}
_NAME, _WIDTH, _UNBROKEN = 15, 118, 100_000


@dataclass(frozen=True)
class Heading:
    """What was examined."""

    file: str
    """Of the configuration; empty without one."""
    ranks: int
    hosts: tuple[str, ...]
    seconds: float


def page(heading: Heading, findings: Sequence[Finding], *, verbose: bool) -> str:
    """One line a check, a remedy under what is not well; `verbose` adds the numbers behind each line."""
    lines = [_head(heading), ""]
    for finding in findings:
        lines += _lines(finding)
        if verbose and finding.details:
            lines += [
                f"{'':{_NAME + 2}}{name}: {json.dumps(value, ensure_ascii=False)}"
                for name, value in finding.details.items()
            ]
    return "\n".join([*lines, "", summary(findings)])


def job_page(heading: Heading, findings: Sequence[Finding], *, verbose: bool) -> str:
    """The same for a job's log: nothing but one line where all is well, else what is not."""
    if verbose:
        return page(heading, findings, verbose=True)
    bad = [finding for finding in findings if finding.level != OK]
    shown = [line for finding in bad for line in _lines(finding, width=None)]  # what is searched for stays in one line
    return "\n".join([f"{_head(heading)}: {summary(findings)}", *shown])


def as_json(heading: Heading, findings: Sequence[Finding], *, in_job: bool) -> str:
    """Everything that is known, one object."""
    return json.dumps(
        {
            **asdict(heading),
            "exit_code": exit_code(findings, in_job=in_job),
            "problems": sum(finding.level == PROBLEM for finding in findings),
            "warnings": sum(finding.level == WARNING for finding in findings),
            "findings": [asdict(finding) for finding in findings],
        },
        ensure_ascii=False,
    )


def summary(findings: Sequence[Finding]) -> str:
    """`2 problems, 1 warning, 12 fine`."""
    counts = {level: sum(finding.level == level for finding in findings) for level in (PROBLEM, WARNING)}
    parts = [f"{number} {level}{'s' * (number > 1)}" for level, number in counts.items() if number]
    return ", ".join([*parts, f"{sum(finding.level == OK for finding in findings)} fine"])


def _head(heading: Heading) -> str:
    ranks = f"{heading.ranks} rank{'s' * (heading.ranks > 1)} on {some(heading.hosts)}"
    of = f"{heading.file} · " if heading.file else ""
    return f"mf-scale doctor · {of}{ranks} · {heading.seconds:.1f} s"


def _lines(finding: Finding, width: int | None = _WIDTH) -> list[str]:
    room = width - _NAME - 2 if width is not None else _UNBROKEN
    first, *rest = wrap(finding.text, room, break_long_words=False, break_on_hyphens=False) or [""]
    lines = [f"{MARKS[finding.level]} {finding.check:<{_NAME}}{first}", *(f"{'':{_NAME + 2}}{line}" for line in rest)]
    if finding.level != OK and finding.remedy:
        first, *rest = wrap(finding.remedy, room - 2, break_long_words=False, break_on_hyphens=False)
        lines += [f"{'':{_NAME + 2}}→ {first}", *(f"{'':{_NAME + 4}}{line}" for line in rest)]
    return lines
