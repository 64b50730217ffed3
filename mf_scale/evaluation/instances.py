"""Instances of all images, kept as run lengths by class, and their mask AP: the same for any number of ranks.

A rank keeps what it saw in temporary files, a share of the classes in each; then the ranks take the shares in turn,
gather one from all and evaluate its classes in order of the images. K classes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mf_scale.data.loader import EvalSample
from mf_scale.distributed import comm
from mf_scale.evaluation.average_precision import COLUMNS, LVIS_MOST, ClassInImage, class_ap
from mf_scale.evaluation.inference import Instances
from mf_scale.evaluation.rle import coco_mask
from mf_scale.evaluation.troubles import named_trouble
from mf_scale.evaluation.turns import agreement, in_turns
from mf_scale.rundir import disk_errors

Step = tuple[int, int, list[ClassInImage]]
"""One class to be evaluated: table (0: mask IoU, 1: boundary IoU), class, its images."""
_SHARES = 64
"""Files of a rank, at most: what one rank gathers at a time is a share of all instances."""
_IN_MEMORY = 1 << 20
"""Bytes of a share that are kept in memory before they go to a file."""


class InstanceRecords:
    """Marked and found instances of this rank's images, on disk where they are many."""

    def __init__(self, classes: int, things: Sequence[bool]) -> None:
        self.classes, self.things = classes, np.asarray(things, dtype=bool)
        self.marked = np.zeros(classes, dtype=np.int64)
        """Instances of each class that are marked, crowds left out."""
        self.federated = False
        shares = min(classes, _SHARES)
        self.files = [tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) for _ in range(shares)]  # noqa: SIM115

    def __enter__(self) -> InstanceRecords:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def add(self, position: int, sample: EvalSample, found: Instances) -> None:
        """Keep one image: of a federated one only what was found of classes that were looked for (LVIS)."""
        federated = sample.federated
        self.federated |= federated is not None
        marked, total = self._marked(sample), len(found)
        labels = found.labels.cpu().numpy()
        kept = np.arange(total)
        if federated is not None:
            kept = kept[:LVIS_MOST]
            looked_for = np.union1d(federated.negative, [*marked])
            kept = kept[np.isin(labels[kept], looked_for)]
        scores = found.scores.cpu().tolist()
        by_label: dict[int, list[tuple[str, float]]] = {}
        counts = {row: coco_mask(found.row(row))["counts"] for row in sorted({int(found.mask_of[i]) for i in kept})}
        for i in kept.tolist():
            by_label.setdefault(int(labels[i]), []).append((counts[int(found.mask_of[i])], scores[i]))
        partly = set() if federated is None else set(federated.not_exhaustive.tolist())
        for label in sorted(marked.keys() | by_label.keys()):
            self._write(label, position, [found.size, marked.get(label, []), by_label.get(label, []), label in partly])

    def _marked(self, sample: EvalSample) -> dict[int, list[tuple[str, int, bool]]]:
        by_label: dict[int, list[tuple[str, int, bool]]] = {}
        for i, label in enumerate(sample.labels.tolist()):
            if self.things[label]:
                mask = sample.segment_map[sample.segment_layer[i]] == i
                crowd = bool(sample.crowd[i])
                self.marked[label] += not crowd
                by_label.setdefault(label, []).append((coco_mask(mask)["counts"], int(mask.sum()), crowd))
        return by_label

    def _write(self, label: int, position: int, content: list[Any]) -> None:
        line = f"{label} {position} {json.dumps(content, separators=(',', ':'))}\n"
        with disk_errors(Path(tempfile.gettempdir())):
            self.files[label % len(self.files)].write(line.encode())

    def share(self, number: int) -> bytes:
        """All lines of a share of the classes, in the order of this rank's images."""
        self.files[number].seek(0)
        return bytes(self.files[number].read())

    def _shares(self, numbers: Sequence[int]) -> list[bytes]:
        with _class_trouble(lambda: "what was found"):
            return [self.share(number) for number in numbers]

    def results(self, *, boundary: bool, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """Numbers of all ranks' instances, with "boundary" where asked for; None where a rank was asked to stop.

        Called by all ranks, which agree before every class (boundary IoU: once more); the same for any number of them.
        """
        federated = agreement(self.federated)[0]
        tables = np.zeros((2 if boundary else 1, self.classes, len(COLUMNS)))
        rank, world = comm.place()

        def evaluate_class(_: int, step: Step) -> None:
            table, label, images = step
            with _class_trouble(lambda: f"class number {label}"):
                tables[table, label] = class_ap(images, federated=federated, boundary=table == 1)

        for first in range(0, len(self.files), world):
            mine: list[bytes] = []
            numbers = range(first, min(first + world, len(self.files)))
            shares = comm.together(partial(self._shares, numbers))
            for owner, number in enumerate(numbers):
                gathered = comm.gather_bytes(shares[owner], owner)
                if owner == rank:
                    mine = gathered
                    tables[:, number :: len(self.files)] = -1
            if not comm.together(partial(in_turns, _steps(mine, len(tables)), evaluate_class, stop)):
                return None
        tables = comm.sum_array(tables)  # a class has numbers on one rank and zeros on the others
        marked = comm.sum_array(self.marked).tolist()
        results = {"federated": federated, **_summary(tables[0], marked)}
        return results | ({"boundary": _summary(tables[1], marked)} if boundary else {})


def _steps(parts: Sequence[bytes], tables: int) -> Iterator[Step]:
    """The classes of a share, each once for every table."""
    with _class_trouble(lambda: "a share of the classes"):
        for label, images in _by_class(parts):
            yield from ((table, label, images) for table in range(tables))


def _class_trouble(name: Callable[[], str]) -> AbstractContextManager[None]:
    remedy = "A smaller eval.instance_top_k needs less memory."
    return named_trouble(name, where="mask AP", remedy=remedy)


def _by_class(parts: Sequence[bytes]) -> Iterator[tuple[int, list[ClassInImage]]]:
    """Classes of a share in order, each with its images in the order of the source."""
    lines = []
    for part in parts:
        for line in part.splitlines():
            label, position, content = line.split(b" ", 2)
            lines.append((int(label), int(position), content))
    lines.sort(key=lambda line: line[:2])
    for label, group in groupby(lines, key=lambda line: line[0]):
        yield label, [_parsed(position, content) for _, position, content in group]


def _parsed(position: int, content: bytes) -> ClassInImage:
    size, marked, found, partly = json.loads(content)
    return ClassInImage(
        position, (size[0], size[1]), [(c, a, crowd) for c, a, crowd in marked], [(c, s) for c, s in found], partly
    )


def _summary(table: NDArray[np.float64], marked: list[int]) -> dict[str, Any]:
    """Means over the classes that have a number, and AP and instances of each class."""
    means = {}
    for column, name in enumerate(COLUMNS):
        values = table[:, column]
        values = values[values > -1]
        means[name] = float(values.mean()) if len(values) else None
    per_class = [float(value) if value > -1 else None for value in table[:, 0]]
    return {**means, "per_class": {"AP": per_class, "instances": marked}}
