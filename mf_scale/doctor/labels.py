"""Labels: what the index counts of each class, against the vocabulary and the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary
from mf_scale.data.index import Index
from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding, some
from mf_scale.errors import UserError
from mf_scale.training.preflight import segment_counts
from mf_scale.unify import with_bands

CHECK = "labels"
_MUCH_UNLABELLED = 0.1
"""Share of images without any segment from which it is said."""


def judge_labels(config: Config, sources: Sequence[Index], validation: Index | None) -> list[Finding]:
    """Classes without an image, images without a segment, what validation has and training has not.

    All have the labels of one vocabulary; one outside of it is refused where an index is opened. Raises the UserError
    of training where model.num_classes contradicts the vocabulary, a band was asked for of a class without an image, or
    nothing at all is labelled.
    """
    vocabulary = sources[0].vocabulary
    check_vocabulary(config, vocabulary, where=", ".join(index.source for index in sources))
    usable = _usable(config, vocabulary.things)
    images = np.sum([index.class_counts() for index in sources], axis=0)
    if config.data.bands:
        with_bands(vocabulary, images)
    images = images * usable
    samples = sum(index.samples for index in sources)
    pieces = (piece for index in sources for piece in segment_counts(index, config.data.task))
    empty = sum(int((piece == 0).sum()) for piece in pieces)
    absent = [
        name for name, count, wanted in zip(vocabulary.names, images, usable, strict=True) if wanted and not count
    ]
    details: dict[str, Any] = {
        "classes": int(usable.sum()),
        "absent": len(absent),
        "images": samples,
        "images_without_segment": empty,
        "rarest": int(images[images > 0].min(initial=0)) if images.any() else 0,
    }
    if not images.any():
        raise UserError(
            f"no image of the training sources has a segment for data.task = {config.data.task}",
            where=", ".join(index.source for index in sources),
            remedy="Take another task or source, or look at how it was packed (`python -m data_tools stats`).",
        )
    found = []
    if absent:
        found.append(
            Finding(
                CHECK,
                WARNING,
                f"{len(absent):,} of {int(usable.sum()):,} classes are in no training image: {some(absent)}",
                "They cannot be learnt: pack more data, or a vocabulary without them.",
                details=details,
            )
        )
    if empty > _MUCH_UNLABELLED * samples:
        found.append(
            Finding(
                CHECK,
                WARNING,
                f"{empty / samples:.0%} of the training images have no segment for data.task = {config.data.task}",
                "They teach no-object alone: is the task or the vocabulary the right one?",
                details=details,
            )
        )
    found += _only_validated(vocabulary.names, images, validation, usable)
    if found:
        return found
    rare = f"the rarest in {details['rarest']:,} of {samples:,} images"
    text = f"{int(usable.sum()):,} classes of {vocabulary.name}, {rare}; {_share(empty, samples)} unlabelled"
    return [Finding(CHECK, OK, text, details=details)]


def judge_vocabularies(reports: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Why sources that open have no vocabulary in common: on every node, or on some, whose tables are not the others'.

    reports: {host, "vocabularies": [[what, where, remedy, fault], ...]} of one rank a host.
    """
    looked = [report for report in reports if "vocabularies" in report]
    told: dict[tuple[str, str, str], dict[str, bool]] = {}
    for report in looked:
        for what, where, remedy, fault in report["vocabularies"]:
            told.setdefault((what, where, remedy), {})[str(report["host"])] = bool(fault)
    found = []
    for (what, where, remedy), hosts in told.items():
        everywhere = len(hosts) == len(looked)
        text = ("" if everywhere else f"{some(list(hosts))}: ") + what + (f" ({where})" if where else "")
        found.append(Finding(CHECK, PROBLEM, text, remedy, fault=not everywhere or all(hosts.values())))
    return found


def _usable(config: Config, things: Sequence[bool]) -> np.ndarray:
    """Classes that can have segments in this task, bool [K]."""
    return np.array(things, dtype=bool) if config.data.task == "instance" else np.ones(len(things), dtype=bool)


def _only_validated(
    names: Sequence[str], images: np.ndarray, validation: Index | None, usable: np.ndarray
) -> list[Finding]:
    if validation is None:
        return []
    counts = validation.class_counts()
    unseen = [
        name
        for name, here, there, wanted in zip(names, images, counts, usable, strict=True)
        if wanted and there and not here
    ]
    if not unseen:
        return []
    what = f"{len(unseen):,} classes of the validation images are in no training image: {some(unseen)}"
    return [
        Finding(CHECK, WARNING, what, "Their scores stay at 0 and lower every mean: look at how the data was split.")
    ]


def _share(part: int, whole: int) -> str:
    return "none" if not part else f"{part:,} images ({part / whole:.1%})"
