"""metrics.jsonl of a run whose starts were cut off and went on writing: what is read is what the newest start told."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from mf_scale.tracking.history import read_history
from mf_scale.tracking.metrics import newest_start, read_metrics

EVENTS = ("step", "keys", "validation", "save", "skipped", "stop", "rollback", "start")
_events = st.tuples(st.sampled_from(EVENTS[:-1]), st.integers(0, 9))
_starts = st.lists(st.tuples(st.integers(0, 9), st.lists(_events, max_size=6)), min_size=1, max_size=5)
_gaps = st.lists(st.integers(1, 3), min_size=5, max_size=5)
_torn = st.sampled_from(['{"event": "st', '{"event": "step", "step": 3', "[]", '{"event": "start"'])


def _line(event: str, step: int, start: int, number: int) -> str:
    return json.dumps({"event": event, "step": step, "time": float(number), "start": start, "told": number})


def _honest(starts: list[tuple[int, list[tuple[str, int]]]], gaps: list[int]) -> list[tuple[int, str]]:
    """(number of the start, line) of starts that follow each other. Numbers may leave gaps: a start was refused."""
    lines: list[tuple[int, str]] = []
    number = 0
    for (step, events), gap in zip(starts, gaps, strict=False):
        number += gap
        for event, at in [("start", step), *events]:
            lines.append((number, _line(event, at, number, len(lines))))
    return lines


def _read(lines: list[str]) -> tuple[list[dict[str, Any]], int, list[tuple[int, int]]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.jsonl"
        file.write_text("".join(f"{line}\n" for line in lines))
        sessions = [(session.number, session.last_step) for session in read_history(file).sessions]
        return read_metrics(file), newest_start(file), sessions


@settings(max_examples=300)
@given(_starts, _gaps, st.data())
def test_lines_of_survivors_change_nothing_wherever_they_stand(starts, gaps, data) -> None:
    honest = _honest(starts, gaps)
    spoilt: list[str] = []
    for number, line in honest:
        spoilt.append(line)
        for _ in range(data.draw(st.integers(0, 2))):
            if data.draw(st.booleans()):
                spoilt.append(data.draw(_torn))
            elif number > 1:
                event, step = data.draw(st.sampled_from(EVENTS)), data.draw(st.integers(0, 9))
                spoilt.append(_line(event, step, data.draw(st.integers(1, number - 1)), -1))
    assert _read(spoilt) == _read([line for _, line in honest])


@given(_starts, _gaps)
def test_without_survivors_every_start_is_there_and_steps_never_go_back_but_at_a_start(starts, gaps) -> None:
    records = _read([line for _, line in _honest(starts, gaps)])[0]
    told = [record for record in records if record["event"] == "start"]
    assert len(told) == len(starts)
    newest = told[-1]
    before = [r for r in records if r["told"] < newest["told"] and r["event"] not in ("start", "stop", "rollback")]
    assert all(record["step"] <= newest["step"] for record in before)
