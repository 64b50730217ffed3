"""Histogram: the values that label maps really hold, held against what was declared about them.

A wrong offset or ignore value trains without an error and to nothing; here it is seen before a byte is packed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.parallel import each, tick
from data_tools.problems import Problems
from data_tools.record import BadRecord, FormatSource, Record, spread_over
from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.ids import IdMeaning
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

USUAL_IGNORE = (255, 65535)
"""What many datasets write where nothing is labelled."""
SHOWN = 8
"""Values, classes or names listed at most."""
ROWS = 12
"""Classes in the table of a report."""
REMEDY = (
    "Declare what these values mean (ignore, background, offset), or give the vocabulary these maps were made with."
)


@dataclass
class Histogram:
    """What a number of label maps hold."""

    pixels: Counter[int] = field(default_factory=Counter)
    """Of each value."""
    maps: Counter[int] = field(default_factory=Counter)
    """That hold each value."""
    example: dict[int, str] = field(default_factory=dict)
    """Key of the first map that holds a value."""
    read: int = 0
    """Maps counted."""
    widest: int = 0
    """Bits of the values of the deepest map."""

    def add(self, key: str, values: Mapping[int, int], bits: int) -> None:
        self.read += 1
        self.widest = max(self.widest, bits)
        for value, pixels in values.items():
            self.pixels[value] += pixels
            self.maps[value] += 1
            self.example.setdefault(value, key)

    def merge(self, other: Histogram) -> None:
        """Take in what another one counted, as if its maps came after."""
        self.pixels.update(other.pixels)
        self.maps.update(other.maps)
        self.example = other.example | self.example
        self.read += other.read
        self.widest = max(self.widest, other.widest)

    def told(self, value: int) -> str:
        """The counts of one value, in words."""
        counts = f"{self.pixels[value]:,} pixels in {self.maps[value]} of {self.read} maps: {self.example[value]}"
        colour = f" = RGB({value & 255}, {value >> 8 & 255}, {value >> 16})" if value > 0xFFFF else ""
        return f"{value}{colour} ({counts})"


@dataclass(frozen=True)
class IdReport:
    """What the values of the maps that were read mean."""

    read: int
    """Maps counted."""
    total: int
    """Maps of the source."""
    class_pixels: np.ndarray
    """int64 [K]."""
    class_maps: np.ndarray
    """Maps that hold each class, int64 [K]."""
    ignored: int
    """Pixels."""
    background: int
    """Pixels."""
    accepted: tuple[str, ...]
    """Doubts that would have been refused."""


def check_ids(source: FormatSource, *, workers: int, most: int, accept: bool, progress: Callable[..., Any]) -> IdReport:
    """Hold the values of `most` maps spread evenly over the source (0: of all) against `source.ids`.

    For sources with `ids` and `values`. `progress` is opened like a tqdm bar. UserError with the counts where a value
    has no meaning or two, and where the ids look shifted or cut; `accept` lets the latter pass.
    """
    if source.ids is None:
        raise ValueError("this source declares no ids")
    histogram = count_values(source, workers=workers, most=most, progress=progress)
    return judge_ids(histogram, source.ids, source.vocabulary, total=len(source.records), accept=accept)


def judge_ids(histogram: Histogram, ids: IdMeaning, vocabulary: Vocabulary, *, total: int, accept: bool) -> IdReport:
    """Hold what was counted against what was declared, as `check_ids` does; `total` is how many maps the source has."""
    _refuse_double_meanings(histogram, ids, vocabulary)
    found = sorted(histogram.pixels)
    meanings = ids.meanings(vocabulary)
    unknown = [value for value in found if value not in meanings]
    if unknown:
        raise UserError(
            f"the label maps hold values that are neither ids of vocabulary {vocabulary.name} nor declared "
            f"({len(unknown)} of {len(found)}): {_told(histogram, unknown)}{_shift_that_fits(found, ids, vocabulary)}",
            remedy=REMEDY,
        )
    doubts = tuple(_doubts(histogram, ids, vocabulary))
    if doubts and not accept:
        more = " read more of them with --check-maps, or" if histogram.read < total else ""
        raise UserError(
            "; ".join(doubts),
            remedy=f"Correct the declaration; if the maps are right as they are,{more} add --accept-ids.",
        )
    return _report(histogram, meanings, len(vocabulary), total, doubts)


def count_values(source: FormatSource, *, workers: int, most: int, progress: Callable[..., Any]) -> Histogram:
    """Histogram over `most` maps spread evenly (0: all), read by `workers` processes; UserError naming broken ones."""
    if source.values is None:
        raise ValueError("this source has no maps of values")
    records = spread_over(source.records, most)
    histogram, problems = Histogram(), Problems()
    jobs = [(source.values, record) for record in records]
    with (
        progress(total=len(jobs), unit="map") as bar,
        closing(each(_count, jobs, workers=workers, bar=bar)) as counts,
    ):
        for record, counted in zip(records, counts, strict=True):
            if isinstance(counted, str):
                problems.add(counted, record.key)
            else:
                histogram.add(record.key, *counted)
    problems.refuse(f"{len(problems)} label maps cannot be read", where="", remedy="Repair them or take them out.")
    if not histogram.pixels:
        raise UserError("there is no label map to read", remedy="Check --split.")
    return histogram


def _count(job: tuple[Callable[[Record], np.ndarray], Record]) -> tuple[dict[int, int], int] | str:
    """Pixels of each value of one map and its bits a value, or why it cannot be read."""
    values_of, record = job
    tick()
    try:
        values = values_of(record)
    except BadRecord as bad:
        return str(bad)
    return value_counts(values), 8 * values.dtype.itemsize


def value_counts(values: np.ndarray) -> dict[int, int]:
    """Pixels of each value of a map."""
    if values.dtype.itemsize <= 2:
        counts = np.bincount(values.ravel())
        found = np.flatnonzero(counts)
        return dict(zip(found.tolist(), counts[found].tolist(), strict=True))
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _refuse_double_meanings(histogram: Histogram, ids: IdMeaning, vocabulary: Vocabulary) -> None:
    label_of = vocabulary.index_of_source_id()
    for what, listed in (("ignore", ids.ignore), ("background", ids.background)):
        for value in listed:
            label = label_of.get(value + ids.offset)
            if label is not None:
                counts = f"{histogram.pixels[value]:,} pixels in {histogram.maps[value]} of {histogram.read} maps"
                raise UserError(
                    f"the {what} value {value} is also that of class {vocabulary.names[label]!r}: {counts} hold it",
                    remedy="A value has one meaning: correct the declaration or the ids of the vocabulary.",
                )


def _told(histogram: Histogram, values: list[int]) -> str:
    most = sorted(values, key=lambda value: -histogram.pixels[value])
    return ", ".join(histogram.told(value) for value in most[:SHOWN]) + (", …" if len(values) > SHOWN else "")


def _shift_that_fits(found: list[int], ids: IdMeaning, vocabulary: Vocabulary) -> str:
    """A hint where the ids are one off: with another offset all but the usual ignore values would be classes."""
    classes = {source_id - ids.offset for source_id in vocabulary.index_of_source_id()}
    for shift in (1, -1):
        rest = [value for value in found if value + shift not in classes]
        if len(rest) < len(found) and all(value in (0, *USUAL_IGNORE, *ids.ignore, *ids.background) for value in rest):
            but = f" but {', '.join(map(str, rest))}" if rest else ""
            return f'; with "offset": {ids.offset + shift} every value{but} would be a class: perhaps they are one off'
    return ""


def _doubts(histogram: Histogram, ids: IdMeaning, vocabulary: Vocabulary) -> list[str]:
    """What is possible but most probably a mistake, in words with the counts."""
    classes = {source_id - ids.offset for source_id in vocabulary.index_of_source_id()}
    found, doubts = set(histogram.pixels), []
    absent = classes - found
    if len(absent) == len(classes):
        doubts.append(f"no map holds a class, only ignored or background values: {_told(histogram, list(found))}")
    for shift in (1, -1):
        if absent and classes <= {value + shift for value in found}:
            taken = sorted(found & {*ids.ignore, *ids.background})
            names = [
                vocabulary.names[i] for i, c in enumerate(vocabulary.classes) if c.source_id - ids.offset in absent
            ]
            doubts.append(
                f"the ids look one off: no map holds {', '.join(map(repr, names[:SHOWN]))}, but with "
                f'"offset": {ids.offset + shift} every class would be found, and a class hides under a declared '
                f"value: {_told(histogram, taken)}"
            )
    cut = {value for value in classes | {*ids.ignore, *ids.background} if value > 255}
    if histogram.widest == 8 and any(value in classes or value & 255 in classes for value in cut):
        doubts.append(
            f"all {histogram.read} maps that were read are 8-bit and cannot hold {len(cut)} of the values of classes "
            f"and of what was declared (up to {max(cut)}): larger values may have been cut off"
        )
    return doubts


def _report(
    histogram: Histogram, meanings: Mapping[int, int], classes: int, total: int, doubts: tuple[str, ...]
) -> IdReport:
    pixels, maps = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    others = {IGNORE: 0, NONE: 0}
    for value, count in histogram.pixels.items():
        label = meanings[value]
        if label >= 0:
            pixels[label] += count
            maps[label] += histogram.maps[value]
        else:
            others[label] += count
    return IdReport(histogram.read, total, pixels, maps, others[IGNORE], others[NONE], doubts)


def format_report(report: IdReport, vocabulary: Vocabulary) -> str:
    """The report as text: shares of pixels, the most frequent classes, the classes that were not found."""
    names = vocabulary.names
    total = int(report.class_pixels.sum()) + report.ignored + report.background
    order = np.argsort(-report.class_pixels, kind="stable")
    present = order[report.class_pixels[order] > 0]
    width = max([len(names[label]) for label in present[:ROWS]], default=0)
    lines = [
        f"ids: {report.read} of {report.total} maps read; every value is a class or declared; "
        f"{len(present)} of {len(names)} classes found; "
        f"ignored {report.ignored / total:.1%}, background {report.background / total:.1%} of the pixels"
    ]
    lines += [
        f"  {names[label]:<{width}}  {report.class_pixels[label] / total:6.1%} of the pixels, "
        f"in {report.class_maps[label]} maps"
        for label in present[:ROWS]
    ]
    if len(present) > ROWS:
        rest = report.class_pixels[present[ROWS:]].sum() / total
        lines.append(f"  {len(present) - ROWS} more classes: {rest:.1%} of the pixels")
    absent = [names[label] for label in np.flatnonzero(report.class_pixels == 0)]
    if absent:
        more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        lines.append(f"  not found: {'; '.join(absent[:SHOWN])}{more}")
    return "\n".join([*lines, *(f"  accepted: {doubt}" for doubt in report.accepted)])
