"""The pages in a real browser: nothing is asked for, nothing scrolls sideways on a phone, tables sort and search."""

from __future__ import annotations

from pathlib import Path

import pytest

from mf_scale.tracking.report.compare import read_runs
from mf_scale.tracking.report.compare_page import write_comparison
from mf_scale.tracking.report.page import write_report
from mf_scale.tracking.report.wrong import Hang
from tests.browser import CHROMIUM, look
from tests.unit.report_runs import counted, evaluated, troubled_run

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
_WIDTH = "document.documentElement.scrollWidth"
_SCROLLING = "[...document.querySelectorAll('.panel')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
_OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"
_FIRST = "document.querySelector('#classes-s-val tbody tr:not([hidden]) td:nth-child(3)').textContent"
_SHOWN = "[...document.querySelectorAll('#classes-s-val tbody tr')].filter(r => !r.hidden).length"
_SORT = "document.querySelectorAll('#classes-s-val thead button')[2].click()"
_SEARCH = """(() => { const box = document.querySelector('input[aria-label="Search All 300 classes"]');
box.value = 'CLASS 29'; box.dispatchEvent(new Event('input')); })()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A report and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [troubled_run(folder / name) for name in ("_a $x$", "a" * 60)]
    for i, run in enumerate(runs):
        run.config.write_text(f"data: {{train: {'long/' * 30}{i}}}\n")
        evaluated(run, classes=300, better=0.1 * i)
    hangs = [Hang("start-2", rank, 8, "rank 1 hangs: no sign of life") for rank in range(3)]
    return [write_report(runs[0], counted(300), hangs), write_comparison(read_runs(runs), folder / "compared.html")]


def test_pages_ask_for_nothing_and_fit_a_phone(pages: list[Path]) -> None:
    for page in pages:
        for width, dark in ((390, False), (1280, True)):
            seen = look(page, [_OPEN, _WIDTH, _SCROLLING], width=width, dark=dark)
            assert seen.requests == [] and seen.complaints == []
            assert seen.values[1:] == [width, 0], page


def test_tables_are_sorted_and_searched_and_read_without_script(pages: list[Path]) -> None:
    seen = look(pages[0], [_OPEN, _FIRST, _SORT, _FIRST, _SORT, _SEARCH, _SHOWN, _FIRST])
    assert seen.complaints == []
    _, first, _, highest, _, _, shown, lowest = seen.values
    assert (first, highest) == ("0.0", "100.0") and 0 < float(lowest) < 100, "up at first, then down, then searched"
    assert shown == 11, "29 and 290 to 299"
    bare = look(pages[0], [_OPEN, _SHOWN, "document.querySelectorAll('.toolbar, th button').length"], script=False)
    assert bare.values[1:] == [300, 0]
