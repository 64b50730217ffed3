"""What went wrong in a run: stragglers, hangs, skipped steps, quarantined samples, jumps of the loss, failed saves."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mf_scale.tracking.console import duration
from mf_scale.tracking.report.curves import Record
from mf_scale.tracking.report.table import Cell, Column, Table, count

MOST_ROWS = 30
"""Rows of a table; what is left out is counted, and stands in metrics.jsonl."""
TROUBLES = ("straggler", "skipped", "quarantine", "rollback", "save_failed", "save_slow", "evaluation_failed")
"""Events that tell of one."""
TAKEN_BACK = "taken_back"
"""Key of a trouble in steps that the run went back over: it happened, though its step was replayed."""
_MOST_KEYS = 4
_REPORT = re.compile(r"(.+)-rank-(\d+)-of-(\d+)\.txt")
_FIRST_LINE_BYTES = 500
_HEAD_BYTES = 64


@dataclass(frozen=True)
class Hang:
    """One file that a hanging rank left in RUN/hang."""

    of: str
    """The start or opening it belongs to."""
    rank: int
    ranks: int
    what: str
    """Its first line."""


def read_hangs(folder: Path) -> list[Hang]:
    """The files of RUN/hang, by start and rank; those that cannot be read are left out."""
    hangs = []
    for file in sorted(folder.glob("*-rank-*.txt")):
        named = _REPORT.fullmatch(file.name)
        if named is None:
            continue
        try:
            with file.open("rb") as stream:
                first = stream.read(_FIRST_LINE_BYTES).decode(errors="replace").partition("\n")[0]
        except OSError:
            continue
        hangs.append(Hang(named[1], int(named[2]), int(named[3]), first))
    return sorted(hangs, key=lambda hang: (hang.of, hang.rank))


def read_troubles(metrics: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that tell of a trouble, once each, those that a later start superseded included.

    A trouble that came again when its step was replayed stands there once, as it was told last.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    newest = 0
    wanted = [f'"event": "{event}"'.encode() for event in (*TROUBLES, "start")]
    try:
        with metrics.open("rb") as file:
            lines = [line for line in file if any(event in line[:_HEAD_BYTES] for event in wanted)]
    except FileNotFoundError:
        return []
    for line in lines:
        record = _parse(line)
        if record is None or (isinstance(record.get("start"), int) and record["start"] < newest):
            continue
        if record["event"] == "start":
            newest = record.get("start") or newest
            for trouble in found.values():
                trouble[TAKEN_BACK] |= trouble["step"] > record["step"] and trouble["event"] != "rollback"
            continue
        same = tuple(str(record.get(key)) for key in ("event", "step", "rank", "phase", "source", "key"))
        found.pop(same, None)
        found[same] = {**record, TAKEN_BACK: False}
    return list(found.values())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("event"), str)
    return record if sound else None


def wrong_tables(records: Sequence[Record], hangs: Sequence[Hang] = ()) -> list[Table]:
    """A table for each kind of trouble that there was."""
    kinds: list[tuple[str, Callable[[Sequence[Record]], Table]]] = [
        ("straggler", _stragglers),
        ("skipped", _skipped),
        ("quarantine", _quarantined),
        ("rollback", _rollbacks),
        ("save_failed", _failed_saves),
        ("save_slow", _slow_saves),
        ("evaluation_failed", _failed_evaluations),
    ]
    found = [(make, [r for r in records if r["event"] == event]) for event, make in kinds]
    return [*([_hangs(hangs)] if hangs else []), *(make(events) for make, events in found if events)]


def _hangs(hangs: Sequence[Hang]) -> Table:
    starts = list(dict.fromkeys(hang.of for hang in hangs))
    rows: list[list[Cell | str]] = []
    for of in starts[-MOST_ROWS:]:
        members = [hang for hang in hangs if hang.of == of]
        told = _listed([str(hang.rank) for hang in members])
        rows.append([of.replace("-", " "), f"{told} of {members[0].ranks}", members[0].what])
    columns = [
        Column("when", text=True),
        Column("ranks that told", text=True, wide=True),
        Column("the first of them", text=True, wide=True),
    ]
    return Table("hangs", _caption("Hangs; the stacks are in RUN/hang", len(starts)), columns, rows)


def _stragglers(events: Sequence[Record]) -> Table:
    groups: dict[tuple[int, str, str], list[Record]] = {}
    for event in events:
        groups.setdefault((event.get("rank", -1), str(event.get("host")), str(event.get("phase"))), []).append(event)
    ranked = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    rows: list[list[Cell | str]] = [
        [
            Cell(f"rank {rank}", small=host),
            phase,
            count(len(members)),
            _ms(max((m["seconds"] for m in members if _number(m, "seconds")), default=None)),
            _ms(_median([m["median"] for m in members if _number(m, "median")])),
            _ms(_median([m["cost"] for m in members if _number(m, "cost")])),
            _steps(members),
        ]
        for (rank, host, phase), members in ranked[:MOST_ROWS]
    ]
    columns = [
        Column("straggler", text=True),
        Column("phase", text=True),
        Column("times told"),
        Column("slowest, ms"),
        Column("median rank, ms"),
        Column("costs, ms a step", about="what the others wait for it, all phases together"),
        Column("steps", text=True),
    ]
    return Table("stragglers", _caption("Stragglers: ranks that the others waited for", len(groups)), columns, rows)


def _skipped(events: Sequence[Record]) -> Table:
    rows: list[list[Cell | str]] = []
    for event in events[-MOST_ROWS:]:
        ranks = [entry for entry in event.get("ranks") or [] if isinstance(entry, Mapping)]
        terms = list(dict.fromkeys(str(term) for entry in ranks for term in entry.get("terms") or []))
        keys = [str(key) for entry in ranks for key in entry.get("keys") or []]
        what = f"loss: {', '.join(terms)}" if event.get("reason") == "loss" else f"gradients: {_groups(event)}"
        numbers = sorted({entry["rank"] for entry in ranks if "rank" in entry})
        rows.append([_step(event), what, _listed([str(n) for n in numbers]), _listed(keys)])
    columns = [
        Column("step", text=True),
        Column("not finite", text=True, wide=True),
        Column("ranks", text=True, wide=True),
        Column("samples", text=True, wide=True),
    ]
    return Table("skipped", _caption("Steps without an update", len(events)), columns, rows)


def _quarantined(events: Sequence[Record]) -> Table:
    shards = Counter(str(event.get("shard")) for event in events)
    worst, most = shards.most_common(1)[0]
    rows: list[list[Cell | str]] = [
        [
            Cell(str(event.get("key")), small=str(event.get("shard"))),
            Cell(count(event["step"]), small=_back(event)),
            str(event.get("reason")),
            str(event.get("replaced_by") or "-"),
        ]
        for event in events[-MOST_ROWS:]
    ]
    columns = [
        Column("sample", text=True),
        Column("step"),
        Column("reason", text=True, wide=True),
        Column("trained instead", text=True, wide=True),
    ]
    several = f", {count(most)} of them in {worst}" if most > 1 and len(shards) > 1 else ""
    return Table("quarantine", _caption(f"Quarantined samples{several}", len(events)), columns, rows)


def _rollbacks(events: Sequence[Record]) -> Table:
    rows: list[list[Cell | str]] = [
        [f"loss of step {count(e.get('spike'))}", count(e.get("to")), count(e.get("skipped"))]
        for e in events[-MOST_ROWS:]
    ]
    columns = [Column("jumped", text=True), Column("went back to step"), Column("global batches left out")]
    return Table("rollbacks", _caption("Jumps of the loss", len(events)), columns, rows)


def _failed_saves(events: Sequence[Record]) -> Table:
    rows: list[list[Cell | str]] = [[_step(e), str(e.get("reason"))] for e in events[-MOST_ROWS:]]
    columns = [Column("checkpoint", text=True), Column("why", text=True, wide=True)]
    return Table("failed-saves", _caption("Checkpoints that were not written", len(events)), columns, rows)


def _failed_evaluations(events: Sequence[Record]) -> Table:
    rows: list[list[Cell | str]] = [[_step(e), str(e.get("reason"))] for e in events[-MOST_ROWS:]]
    columns = [Column("evaluation", text=True), Column("why", text=True, wide=True)]
    return Table("failed-evaluations", _caption("Evaluations that failed", len(events)), columns, rows)


def _slow_saves(events: Sequence[Record]) -> Table:
    rows: list[list[Cell | str]] = [
        [
            _step(e),
            duration(e["seconds"]).replace(" ", "\u00a0") if _number(e, "seconds") else "-",
            _listed([str(rank) for rank in e.get("ranks") or []]),
        ]
        for e in events[-MOST_ROWS:]
    ]
    columns = [
        Column("checkpoint", text=True),
        Column("written for"),
        Column("ranks still writing", text=True, wide=True),
    ]
    return Table("slow-saves", _caption("Checkpoints that took long", len(events)), columns, rows)


def _step(event: Record) -> Cell:
    return Cell(f"step {count(event['step'])}", small=_back(event))


def _back(event: Record) -> str:
    return "taken back later" if event.get(TAKEN_BACK) else ""


def _caption(text: str, number: int) -> str:
    return f"{text} ({count(number)}{f', the newest {MOST_ROWS} shown' if number > MOST_ROWS else ''})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {count(len(names) - _MOST_KEYS)} more" if len(names) > _MOST_KEYS else ""
    return ", ".join(names[:_MOST_KEYS]) + more or "-"


def _steps(events: Sequence[Record]) -> str:
    first, last = events[0]["step"], events[-1]["step"]
    return count(first) if first == last else f"{count(first)} to {count(last)}"


def _groups(event: Record) -> str:
    return ", ".join(str(group) for group in event.get("groups") or []) or "no group by itself"


def _number(record: Record, key: str) -> bool:
    return isinstance(record.get(key), int | float)


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.4g}"
