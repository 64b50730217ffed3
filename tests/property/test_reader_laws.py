"""Every reader of metrics.jsonl goes by one law of what holds: the lines, the history, what W&B is told, the page."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mf_scale.tracking.history import read_history
from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.wandb_values import rows, wandb_values

KINDS = ("validation", "save", "quarantine", "evaluation", "skipped")
_start = st.tuples(st.integers(0, 8), st.integers(1, 8), st.lists(st.sampled_from(KINDS), unique=True))
"""How far back it begins, the steps that it takes, the events behind each step."""


def _lines(starts: list[tuple[int, int, list[str]]]) -> list[dict[str, Any]]:
    """As a trainer writes them: each start begins where an earlier one has been and takes steps in order."""
    lines: list[dict[str, Any]] = []
    reached = 0
    for number, (back, steps, events) in enumerate(starts, start=1):
        first = max(0, reached - back)
        told: list[tuple[str, int]] = [("start", first)]
        for step in range(first + 1, first + steps + 1):
            told += [("step", step), *((event, step) for event in events)]
        for event, step in [*told, ("stop", first + steps)]:
            loss = float(len(lines))
            lines.append({"event": event, "step": step, "time": loss, "start": number, "loss": loss, "split": "val"})
        reached = first + steps
    return lines


@settings(max_examples=200)
@given(st.lists(_start, min_size=1, max_size=5))
def test_all_readers_agree_on_what_holds(starts: list[tuple[int, int, list[str]]]) -> None:
    lines = _lines(starts)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.jsonl"
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        held, history = read_metrics(file), read_history(file)
    newest = {(line["event"], line["step"]): line for line in lines}
    last = lines[-1]["step"]
    steps = [line for line in held if line["event"] == "step"]
    # Each step once, in order, without gaps, as it was told last.
    assert [line["step"] for line in steps] == list(range(1, last + 1))
    assert all(line == newest["step", line["step"]] for line in steps)
    of = {kind: [line for line in held if line["event"] == kind] for kind in KINDS}
    assert all(line == newest[kind, line["step"]] for kind in KINDS for line in of[kind])
    assert [save["step"] for save in history.saves] == [line["step"] for line in of["save"]]
    assert history.validation == (of["validation"][-1] if of["validation"] else None)
    assert history.quarantined == len(of["quarantine"])
    assert history.last_line == steps[-1] and [session.number for session in history.sessions] == [
        line["start"] for line in held if line["event"] == "start"
    ]
    table = rows(held)
    assert list(table) == list(range(1, last + 1)) and all(table[step]["step"] == step for step in table)
    expected: dict[int, dict[str, float]] = {step: {} for step in table}
    for line in held:
        expected.get(line["step"], {}).update(wandb_values(line))
    told = {step: {n: v for n, v in row.items() if n not in ("step", "_timestamp")} for step, row in table.items()}
    assert told == expected
