"""The progress line: rewritten in place on a terminal, plain lines elsewhere, notes never torn."""

from __future__ import annotations

import io

import pytest

from mf_scale.tracking.console import ProgressLine, duration


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _screen(text: str) -> list[str]:
    """What a terminal shows: `\\r` and "clear to the end of the line" carried out."""
    return [line.rsplit("\r\x1b[K", 1)[-1] for line in text.split("\n")]


def test_a_log_file_gets_one_plain_line_an_update() -> None:
    out = io.StringIO()
    line = ProgressLine(1000, out)
    line.update(10, 3.25, 17.5, 0.012, 185)
    line.update(20, 3.0, 17.0, 0.0, 100)
    line.close()
    first, second = out.getvalue().splitlines()
    assert first == "step    10/1,000   1% · loss 3.25 · 17.5 images/s · data wait 12 ms · eta 3 min 05 s"
    assert second.startswith("step    20/1,000   2%")
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_what_is_not_known_is_left_out() -> None:
    out = io.StringIO()
    ProgressLine(10, out).update(10)
    assert out.getvalue() == "step 10/10 100%\n"


def test_a_terminal_shows_one_live_line() -> None:
    out = _Terminal()
    line = ProgressLine(100, out)
    line.update(1, 2.0)
    line.update(2, 1.0)
    assert _screen(out.getvalue()) == ["step   2/100   2% · loss 1"]
    line.close()
    assert _screen(out.getvalue()) == ["step   2/100   2% · loss 1", ""]


def test_a_note_stands_above_the_live_line() -> None:
    out = _Terminal()
    line = ProgressLine(100, out)
    line.note("starting")
    line.update(1, 2.0)
    line.note("saved step 1")
    assert _screen(out.getvalue()) == ["starting", "saved step 1", "step   1/100   1% · loss 2"]


def test_the_live_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    out = _Terminal()
    ProgressLine(100, out).update(1, 2.0, 100.0, 0.1, 100)
    (shown,) = _screen(out.getvalue())
    assert len(shown) == 29


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7980, "2 h 13 min"),
        (367200, "4 d 06 h"),
        (float("inf"), "unknown"),
        (float("nan"), "unknown"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
