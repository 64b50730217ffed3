"""The state of runs as text of 100 columns: a page for one run, a table for several."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence

from mf_scale.tracking import state as words
from mf_scale.tracking.console import duration
from mf_scale.tracking.starts import DONE, KILLED, LOST, SILENT, STOPPED, Start
from mf_scale.tracking.status import RunStatus, Speed

WIDTH = 100
MOST_STARTS = 20
"""Newest starts that the page of a run lists."""
_BAR = 32
_LABEL = 13
_COLOURS = {
    words.RUNNING: 32, words.DONE: 32, words.STARTING: 36, words.QUEUED: 36, words.REQUEUED: 36, words.STOPPED: 33,
}  # fmt: skip
_RED, _BOLD, _DIM = 31, 1, 2
_UNKNOWN = "-"


def page(status: RunStatus, *, colour: bool) -> str:
    """Everything about one run."""
    ink = _ink if colour else _plain
    lines = [*_wrapped(status.run, ink, _BOLD), *_headline(status, ink), ""]
    facts = [
        ("step", _step(status)),
        ("last line", _speed(status.last)),
        ("last hour", _speed(status.hour)),
        ("left", _left(status)),
        ("loss", _loss(status)),
        ("checkpoint", _checkpoint(status)),
        ("left out", _left_out(status)),
        ("lost", _lost(status)),
    ]
    for name, text in facts:
        for row, part in enumerate(textwrap.wrap(text, WIDTH - _LABEL)):
            lines.append(f"{ink(f'{name if row == 0 else str():<{_LABEL}}', _DIM)}{part}")
    return "\n".join([*lines, *_starts(status, ink)])


def table(statuses: Sequence[RunStatus], *, colour: bool) -> str:
    """One line a run."""
    ink = _ink if colour else _plain
    head = ("run", "state", "step", "", "loss", "validation", "images/s", "starts", "lost", "left")
    rows = [_row(status) for status in statuses]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    widths[0] = max(8, min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(head) - 1)))
    lines = [ink(_joined(head, widths), _DIM)]
    for status, row in zip(statuses, rows, strict=True):
        # The end of a path tells more than its beginning.
        name = row[0] if len(row[0]) <= widths[0] else "…" + row[0][1 - widths[0] :]
        lines.append(_joined((name, *row[1:]), widths, lambda text, s=status: ink(text, _colour(s))).rstrip())
    return "\n".join(lines)


def _row(status: RunStatus) -> tuple[str, ...]:
    of = f"/{status.steps:,}" if status.steps else ""
    return (
        status.run,
        status.state.word,
        f"{status.step:,}{of}",
        f"{_share(status):.0%}" if status.steps else "",
        _number(status.loss),
        _number(status.validation.loss if status.validation else None),
        _number(status.last.images_per_second if status.last else None),
        str(len(status.starts)),
        f"{status.lost_steps:,}",
        _span(status.eta_seconds) if status.state.word != words.DONE else _UNKNOWN,
    )


def _joined(cells: Sequence[str], widths: Sequence[int], state_ink: object = None) -> str:
    texts = [f"{cells[0]:<{widths[0]}}", f"{cells[1]:<{widths[1]}}"]
    if callable(state_ink):
        texts[1] = str(state_ink(texts[1]))
    return "  ".join([*texts, *(f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True))])


def _headline(status: RunStatus, ink: Ink) -> list[str]:
    since = f" · since {_clock(status.state.since, status.asked)}" if status.state.since else ""
    told = textwrap.wrap(f"{status.state.sentence}{since}", WIDTH - 2) or [""]
    lines = [f"{ink('●', _colour(status))} {told[0]}", *(f"  {line}" for line in told[1:])]
    if status.heard and status.state.lives:
        lines.append(f"  {ink(f'last sign of life {_ago(status.asked - status.heard)}', _DIM)}")
    return lines


def _step(status: RunStatus) -> str:
    if not status.steps:
        return f"{status.step:,}"
    full = min(_BAR, int(_share(status) * _BAR))
    return f"{status.step:,} of {status.steps:,}  {'█' * full}{'░' * (_BAR - full)} {_share(status):.1%}"


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return ""
    images, step, wait = speed.images_per_second, speed.step_seconds, speed.data_wait_seconds
    return (
        f"{_number(images):>7} images/s   {_milliseconds(step):>9} a step   "
        f"{_milliseconds(wait):>9} of it waiting for data"
    )


def _left(status: RunStatus) -> str:
    if status.state.word == words.DONE:
        return ""
    eta, restarts = status.eta_seconds, status.eta_with_restarts_seconds
    end = f" ({_clock(status.asked + eta, status.asked)})" if eta is not None and status.state.word == words.RUNNING \
        else ""  # fmt: skip
    return f"{_span(eta)} at this speed{end} · {_span(restarts)} at that of its whole life, with restarts"


def _loss(status: RunStatus) -> str:
    validation = status.validation
    told = f" · validation {_number(validation.loss)} at step {validation.step:,}" if validation else ""
    return f"{_number(status.loss)}{told}"


def _checkpoint(status: RunStatus) -> str:
    saved = status.checkpoint
    if saved is None:
        return f"none yet: {_steps(status.unsaved_steps)} would be lost"
    parts = [f"step {saved.step:,}, {_ago(status.asked - saved.time)}"]
    if saved.bytes is not None and saved.seconds is not None:
        waited = "" if saved.stall is None else f", training waited {saved.stall:.2g} s"
        parts.append(f"{_bytes(saved.bytes)} in {saved.seconds:.2g} s{waited}")
    if status.unsaved_steps:
        parts.append(f"{_steps(status.unsaved_steps)} since")
    return " · ".join(parts)


def _left_out(status: RunStatus) -> str:
    skipped = _UNKNOWN if status.skipped is None else f"{status.skipped:,}"
    noun = "step" if skipped == "1" else "steps"
    return f"{skipped} {noun} without an update · {status.quarantined:,} samples quarantined"


def _lost(status: RunStatus) -> str:
    if len(status.starts) < 2:
        return ""
    images = f", {status.lost_images:,} images" if status.lost_images else ""
    seconds = f", {_span(status.lost_seconds)}" if status.lost_steps else ""
    restarts = "1 restart" if status.restarts == 1 else f"{status.restarts:,} restarts"
    return f"{_steps(status.lost_steps)}{images}{seconds} in {restarts} · {_span(status.down_seconds)} without training"


def _starts(status: RunStatus, ink: Ink) -> list[str]:
    if not status.starts:
        return []
    head = ("#", "began", "job", "ranks", "steps", "lost", "down", "end")
    rows = [start_cells(start, status.asked) for start in status.starts[-MOST_STARTS:]]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    room = max(20, WIDTH - sum(widths) - 2 * len(widths))
    lines = ["", ink(_cells(head, widths), _DIM)]
    if len(status.starts) > MOST_STARTS:
        lines.append(ink(f"{len(status.starts) - MOST_STARTS:,} earlier starts: --json has them all", _DIM))
    for row in rows:
        first, *more = textwrap.wrap(row[-1], room) or [""]
        lines.append(_cells((*row[:-1], first), widths))
        lines += [" " * (sum(widths) + 2 * len(widths)) + line for line in more]
    return lines


def start_cells(start: Start, now: float) -> tuple[str, ...]:
    """A start as cells: number, began, job, ranks on nodes, steps, lost steps and their time, time down, end."""
    job = _UNKNOWN if start.job is None else start.job + ("" if start.restart is None else f".{start.restart}")
    at = start.launched or start.began
    return (
        _UNKNOWN if start.number is None else str(start.number),
        _clock(at, now) if at else _UNKNOWN,
        job,
        _ranks(start),
        f"{start.from_step:,} → {start.reached:,}" if start.number is not None else _UNKNOWN,
        _lost_cell(start),
        "" if start.down_seconds is None else _span(start.down_seconds),
        start_end(start),
    )


def _ranks(start: Start) -> str:
    if start.ranks is None:
        return _UNKNOWN
    return f"{start.ranks} on {len(start.nodes)}" if len(start.nodes) > 1 else str(start.ranks)


def _lost_cell(start: Start) -> str:
    if start.lost_steps is None:
        return ""
    took = f" ({duration(start.lost_seconds)})" if start.lost_steps and start.lost_seconds is not None else ""
    return f"{start.lost_steps:,}{took}"


def start_end(start: Start) -> str:
    """How a start ended, in a sentence; empty while it has no end."""
    if start.end is None:
        return ""
    if start.end == LOST:
        return "cut off without a word"
    if start.end == STOPPED and start.why.startswith("SIG"):
        return f"stopped by {start.why}"
    plain = start.end in (DONE, STOPPED, KILLED, SILENT) or start.end in start.why
    return start.why if plain and start.why else f"{start.end}: {start.why}".removesuffix(": ")


def _cells(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = {1, 2}
    texts = [f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=False))]
    return "  ".join([*texts, cells[-1]]).rstrip()


def _wrapped(text: str, ink: Ink, code: int) -> list[str]:
    return [ink(line, code) for line in textwrap.wrap(text, WIDTH) or [text]]


def _share(status: RunStatus) -> float:
    return min(1.0, status.step / status.steps) if status.steps else 0.0


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _milliseconds(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else f"{seconds * 1000:,.0f} ms"


def _span(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else duration(seconds)


def _ago(seconds: float) -> str:
    return f"{duration(max(0.0, seconds))} ago"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1000:.0f} kB"


def _clock(at: float, now: float) -> str:
    """Local time; of another day with its date."""
    then, today = time.localtime(at), time.localtime(now)
    same = then[:3] == today[:3]
    return time.strftime("%H:%M:%S" if same else "%d %b %H:%M" if then[0] == today[0] else "%d %b %Y", then)


def _colour(status: RunStatus) -> int:
    return _COLOURS.get(status.state.word, _RED)


class Ink:
    """How a piece of text is shown."""

    def __call__(self, text: str, code: int) -> str:
        return text


class _Colour(Ink):
    def __call__(self, text: str, code: int) -> str:
        return f"\x1b[{code}m{text}\x1b[0m"


_plain, _ink = Ink(), _Colour()
