"""The check of ids against the histogram of the maps: what passes, what is refused and with which counts."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.formats.label_maps import payload_codes, payload_values
from data_tools.histogram import Histogram, IdReport, check_ids, format_report, judge_ids, value_counts
from data_tools.record import FormatSource, Record
from mf_scale.data.ids import IdMeaning
from mf_scale.errors import UserError
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.unit.map_trees import save_map


class Bar:
    """A progress bar that remembers."""

    total = 0
    shown = 0

    @contextlib.contextmanager
    def __call__(self, *, total: int, unit: str):
        self.total, self.shown = total, 0
        assert unit == "map"
        yield self

    def update(self, amount: int) -> None:
        self.shown += amount


def classes(count: int, first: int = 1) -> Vocabulary:
    return Vocabulary("v", tuple(ClassInfo(f"c{first + i}", False, first + i) for i in range(count)))


def source(folder: Path, maps: list, vocabulary: Vocabulary, mode: str = "L", **ids: Any) -> FormatSource:
    """A source of maps of one row each."""
    records = []
    for number, values in enumerate(maps):
        path = folder / f"m{number}.png"
        save_map(path, np.array([values], np.int32), mode)
        records.append(Record(f"m{number}", path, {}, path))
    values = payload_codes if mode == "RGB" else payload_values
    return FormatSource(vocabulary, records, lambda record: None, "", "semantic", IdMeaning(**ids), values)  # type: ignore


def check(checked: FormatSource, *, workers: int = 1, most: int = 0, accept: bool = False) -> IdReport:
    return check_ids(checked, workers=workers, most=most, accept=accept, progress=Bar())


def test_the_report_counts_pixels_maps_ignored_and_background(tmp_path):
    report = check(
        source(tmp_path, [[0, 1, 1, 3], [255, 255, 1, 4]], classes(4), ignore=(255,), background=(0,)), workers=2
    )
    assert report.class_pixels.tolist() == [3, 0, 1, 1] and report.class_maps.tolist() == [2, 0, 1, 1]
    assert (report.ignored, report.background, report.read, report.total) == (2, 1, 2, 2)
    text = format_report(report, classes(4))
    assert "2 of 2 maps read" in text and "3 of 4 classes found; ignored 25.0%, background 12.5%" in text
    assert "c1   37.5% of the pixels, in 2 maps" in text and "not found: c2" in text


def test_maps_are_taken_evenly_and_the_bar_moves_by_map(tmp_path):
    checked = source(tmp_path, [[1 + i % 3] for i in range(21)], classes(3))
    bar = Bar()
    report = check_ids(checked, workers=2, most=5, accept=False, progress=bar)
    assert (report.read, report.total, bar.total, bar.shown) == (5, 21, 5, 5)
    assert report.class_maps.tolist() == [2, 1, 2]  # maps 0, 5, 10, 15, 20
    assert check_ids(checked, workers=1, most=0, accept=False, progress=bar).read == 21 == bar.shown


def test_values_without_a_meaning_are_refused_with_their_counts(tmp_path):
    checked = source(tmp_path, [[1, 2, 9, 9, 9], [7, 9, 1, 2, 3]], classes(3))
    with pytest.raises(UserError) as caught:
        check(checked, accept=True)  # accepting doubts accepts no unknown value
    assert "(2 of 5): 9 (4 pixels" in str(caught.value)
    assert "9 (4 pixels in 2 of 2 maps: m0), 7 (1 pixels in 1 of 2 maps: m1)" in str(caught.value)


@pytest.mark.parametrize(
    ("maps", "first", "offset"),
    [([[1, 2, 3, 4]], 0, -1), ([[0, 1, 2, 3, 255]], 1, 1), ([[0, 1, 2, 3, 255]], 11, 11), ([[4, 1, 0, 2, 3]], 0, -1)],
)
def test_ids_one_off_are_recognised(tmp_path, maps, first, offset):
    declared: dict[str, Any] = {"ignore": (255,), "offset": offset - (1 if offset > 0 else -1)}
    with pytest.raises(UserError, match=f'"offset": {offset} every value.* would be a class'):
        check(source(tmp_path, maps, classes(4, first), **declared))


def test_no_shift_is_proposed_where_none_fits(tmp_path):
    with pytest.raises(UserError) as caught:
        check(source(tmp_path, [[1, 2, 9]], classes(4)))
    assert "offset" not in str(caught.value).split(". ")[0]


def test_a_value_with_two_meanings_is_refused_with_its_counts(tmp_path):
    declared: dict[str, Any]
    for what in ("ignore", "background"):
        declared = {what: (3,)}
        with pytest.raises(UserError, match=f"the {what} value 3 is also that of class 'c3': 2 pixels in 1 of 2 maps"):
            check(source(tmp_path, [[1, 2, 3, 3], [1, 1, 1, 1]], classes(3), **declared), accept=True)
    with pytest.raises(UserError, match="the ignore value 0 is also that of class 'c1': 1 pixels in 1 of 1 maps"):
        check(source(tmp_path, [[0, 1, 2]], classes(3), ignore=(0,), offset=1))
    with pytest.raises(UserError, match="background value 0 is also that of ignore and background"):
        check(source(tmp_path, [[0, 1, 2, 3]], classes(3), ignore=(0,), background=(0,)))


@pytest.mark.parametrize(
    ("maps", "first", "ids"),
    [
        ([[0, 1, 2], [1, 2, 0]], 1, {"ignore": (0,)}),  # 0-based maps under ids from 1: class 1 hides under 0
        ([[0, 1, 2, 255]], 1, {"background": (0,), "ignore": (255,)}),
        ([[1, 2, 3]], 0, {"ignore": (3,)}),  # 1-based maps under ids from 0
        ([[6, 7, 8, 255]], 1, {"ignore": (6, 255), "offset": -6}),
    ],
)
def test_an_off_by_one_that_an_ignore_value_hides_is_refused_unless_accepted(tmp_path, maps, first, ids: Any):
    checked = source(tmp_path, maps, classes(3, first), **ids)
    with pytest.raises(UserError) as caught:
        check(checked)
    assert "look one off" in str(caught.value) and "add --accept-ids" in str(caught.value)
    assert f"'c{first + 2 if first else 0}'" in str(caught.value)
    report = check(checked, accept=True)
    assert "look one off" in report.accepted[0] and "accepted: the ids" in format_report(report, classes(3, first))


def test_small_data_that_lacks_classes_raises_no_false_alarm(tmp_path):
    # Of 150 classes 91 are found, with the ignore value beside them, the last class found or not.
    for found in ([*range(0, 91), 150], [*range(0, 91)], [*range(0, 149)], [*range(0, 151)], [1, 2], [255, 0, 1]):
        check(source(tmp_path, [found], classes(150), ignore=(0, 255)))


def test_the_message_says_to_read_more_maps_where_not_all_were_read(tmp_path):
    checked = source(tmp_path, [[0, 1, 2], [0, 1, 2], [3, 1, 2]], classes(3), ignore=(0,))
    with pytest.raises(UserError, match="read more of them with --check-maps, or add --accept-ids"):
        check_ids(checked, workers=1, most=1, accept=False, progress=Bar())
    assert check(checked).accepted == ()


def test_maps_that_cannot_hold_the_ids_are_refused_unless_accepted(tmp_path):
    checked = source(tmp_path, [[1, 2, 3, 0]], classes(459), ignore=(0,))
    with pytest.raises(UserError, match=r"all 1 maps .* are 8-bit and cannot hold 204 of the values .*up to 459"):
        check(checked)
    assert len(check(checked, accept=True).accepted) == 1
    deep = source(tmp_path / "deep", [[1, 2, 3, 0]], classes(459), mode="I;16", ignore=(0,))
    assert check(deep).accepted == ()
    # 65535 cut to 8 bits is 255, which is a class of the one vocabulary and nothing in the other.
    with pytest.raises(UserError, match="cannot hold 1 of the values"):
        check(source(tmp_path, [[1, 2, 255]], classes(255), ignore=(65535,)))
    assert check(source(tmp_path, [[1, 2, 255]], classes(9), ignore=(255, 65535))).accepted == ()


def test_maps_without_any_class_are_refused_unless_accepted(tmp_path):
    checked = source(tmp_path, [[255, 0, 0, 255]], classes(3), ignore=(255,), background=(0,))
    with pytest.raises(UserError, match=r"no map holds a class.*255 \(2 pixels in 1 of 1 maps"):
        check(checked)
    assert check(checked, accept=True).class_pixels.sum() == 0


def test_values_beyond_16_bits_are_told_as_colours(tmp_path):
    vocabulary = Vocabulary("v", (ClassInfo("red", False, 255), ClassInfo("blue", False, 255 << 16)))
    report = check(source(tmp_path, [[255, 255 << 16, 255]], vocabulary, mode="RGB"))
    assert report.class_pixels.tolist() == [2, 1]
    with pytest.raises(UserError, match=r"131327 = RGB\(255, 0, 2\) \(1 pixels"):
        check(source(tmp_path, [[255, (2 << 16) + 255]], vocabulary, mode="RGB"))


@pytest.mark.parametrize("workers", [1, 2])
def test_maps_that_cannot_be_read_are_all_told(tmp_path, workers):
    checked = source(tmp_path, [[1, 2]] * 6, classes(2))
    for number in (1, 4):
        (tmp_path / f"m{number}.png").write_bytes(b"not a PNG")
    os.truncate(tmp_path / "m5.png", 44)
    with pytest.raises(UserError, match=r"3 label maps cannot be read.*m1, m4"):
        check(checked, workers=workers)


def test_histograms_merge_as_if_counted_at_once():
    parts: list[np.ndarray] = [
        np.array([[1, 1, 2]], np.uint8),
        np.array([[2, 3, 3]], np.uint16),
        np.array([[3, 3, 9]], np.int32),
    ]
    whole, left, right = Histogram(), Histogram(), Histogram()
    for number, values in enumerate(parts):
        for histogram in (whole, left if number < 1 else right):
            histogram.add(f"k{number}", value_counts(values), 8 * values.dtype.itemsize)
    left.merge(right)
    assert left == whole and left.widest == 32 and left.example == {1: "k0", 2: "k0", 3: "k1", 9: "k2"}
    report = judge_ids(left, IdMeaning(ignore=(9,)), classes(3), total=7, accept=False)
    assert report.class_pixels.tolist() == [2, 2, 4] and report.total == 7


@pytest.mark.parametrize("ignored", [(), (0xFFFFFF,)])
def test_one_large_value_takes_no_memory(ignored):
    histogram = Histogram()
    histogram.add("a", {1: 5, 2: 5, 0xFFFFFF: 2}, 32)
    tracemalloc.start()
    if ignored:
        report = judge_ids(histogram, IdMeaning(ignore=ignored), classes(2), total=1, accept=False)
        assert report.ignored == 2
    else:
        with pytest.raises(UserError, match="16777215"):
            judge_ids(histogram, IdMeaning(), classes(2), total=1, accept=False)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"ignore": "255"}, "not a list"),
        ({"ignore": [255.7]}, "255.7 is not a whole number"),
        ({"offset": True}, "True is not a whole number"),
        ({"offset": -1.9}, "not a whole number"),
        ({"ignore": [-1]}, "-1 is no value of a map"),
        ({"ignore": [255, 255]}, "255 is listed twice"),
        ({"ignore": [3], "background": [3]}, "3 is listed twice"),
        ({"ignored": [3]}, "unknown"),
    ],
)
def test_a_meaning_is_read_as_it_was_written(data, said):
    with pytest.raises(UserError, match=said):
        IdMeaning.from_dict(data, where="classes.json")
