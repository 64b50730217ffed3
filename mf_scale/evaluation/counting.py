"""Counting: what an evaluation adds up of each image, for the tasks there are, and the results of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mf_scale.config.schema import Config
from mf_scale.data.batch import NONE
from mf_scale.data.loader import EvalSample
from mf_scale.distributed import comm
from mf_scale.evaluation.bands import band_results
from mf_scale.evaluation.confusions import ConfusionCounts
from mf_scale.evaluation.forward import Answer
from mf_scale.evaluation.instances import InstanceRecords
from mf_scale.evaluation.metrics import PanopticCounts, SemanticCounts
from mf_scale.tracking.pictures import Segmentation
from mf_scale.vocabulary import Vocabulary

Views = list[tuple[str, Segmentation]]
PICTURE_SCORES = {"semantic": "mIoU", "panoptic": "PQ", "instance": "PQ"}
"""By which number of its own an image is among the best or the worst."""


@dataclass(frozen=True)
class Said:
    """What was said of one image, in the forms that are counted and drawn (None: not of this task)."""

    classes: NDArray[np.int64] | None
    """[H,W]."""
    segments: Segmentation | None


@dataclass
class Counts:
    """The counts a task needs."""

    vocabulary: Vocabulary
    config: Config
    semantic: SemanticCounts | None = None
    panoptic: PanopticCounts | None = None
    instances: InstanceRecords | None = None
    confusions: ConfusionCounts | None = None
    outlines: SemanticCounts | None = None
    """Of the bands along the outlines of classes, for boundary IoU."""
    outlined: PanopticCounts | None = None
    """By boundary IoU."""

    def add(self, position: int, sample: EvalSample, said: Answer, *, scored: bool) -> float | None:
        """Add one image; its own score (PICTURE_SCORES) if `scored`, None where nothing of the task is in it."""
        heard = hear(said, self.vocabulary, self.config)
        flat = flat_map(sample.segment_map)
        if heard.classes is not None:
            truth = class_map(flat, sample.labels)
            for counts in (self.semantic, self.confusions):
                if counts is not None:
                    counts.update(heard.classes, truth)
            if self.outlines is not None:
                self.outlines.update_outlines(heard.classes, truth)
        if heard.segments is not None:
            for panoptic in (self.panoptic, self.outlined):
                if panoptic is not None:
                    _add_segments(panoptic, heard.segments, sample, flat)
        if self.instances is not None:
            self.instances.add(position, sample, said.instance(self.vocabulary.things, self.config))
        return _own_score(heard, sample, flat, self.vocabulary) if scored else None

    def results(self, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """Results over all ranks; mIoU, PQ and AP, the ones that are quoted, on top (None: not of this task).

        None where a rank was asked to stop. Called by all ranks; the same for any number of them.
        """
        results: dict[str, Any] = {"mIoU": None, "PQ": None, "AP": None}
        if self.semantic is not None:
            results |= self._semantic_results(self.semantic)
        if self.panoptic is not None:
            panoptic = _panoptic_results(self.panoptic)
            if self.outlined is not None:
                panoptic["boundary"] = _panoptic_results(self.outlined)
            quoted = "things" if self.semantic is None else "all"
            results |= {"PQ": panoptic[quoted]["PQ"], "panoptic": panoptic}
        if self.instances is not None:
            instances = self.instances.results(boundary=self.config.eval.boundary, stop=stop)
            if instances is None:
                return None
            results |= {"AP": instances["AP"], "instances": instances}
        bands = band_results(self.vocabulary, results)
        if bands is not None:
            results["bands"] = bands
            if self.instances is not None:
                of_bands = {f"AP{band[0]}": bands[band]["AP"] for band in ("rare", "common", "frequent")}
                results["instances"] = {**of_bands, **results["instances"]}
        return results

    def _semantic_results(self, counts: SemanticCounts) -> dict[str, Any]:
        summed = comm.sum_array(counts.to_array())
        semantic = SemanticCounts.from_array(summed).results()
        if self.outlines is not None:
            outlines = SemanticCounts.from_array(comm.sum_array(self.outlines.to_array())).results()
            semantic["boundary"] = {"mIoU": outlines["mIoU"], "per_class": {"IoU": outlines["per_class"]["IoU"]}}
        told: dict[str, Any] = {"mIoU": semantic["mIoU"], "semantic": semantic}
        if self.confusions is not None:
            told["confusions"] = self.confusions.results(summed[2])
        return told


def start_counts(vocabulary: Vocabulary, config: Config, stack: ExitStack) -> Counts:
    """Empty counts for data.task; what they keep on disk goes when `stack` closes.

    semantic: classes; panoptic: classes, segments and instances of the things; instance: segments and instances.
    """
    task, classes, things = config.data.task, len(vocabulary), vocabulary.things
    counts = Counts(vocabulary, config)
    if task != "instance":
        counts.semantic, counts.confusions = SemanticCounts(classes), ConfusionCounts(classes)
        counts.outlines = SemanticCounts(classes) if config.eval.boundary else None
    if task != "semantic":
        counts.panoptic = PanopticCounts(classes, things)
        counts.outlined = PanopticCounts(classes, things, boundary=True) if config.eval.boundary else None
        if any(things):
            counts.instances = stack.enter_context(InstanceRecords(classes, things))
    return counts


def hear(said: Answer, vocabulary: Vocabulary, config: Config) -> Said:
    """The answer in the forms of data.task."""
    task = config.data.task
    classes = said.semantic() if task != "instance" else None
    if task == "semantic":
        return Said(classes, None)
    segment_map, segments = said.panoptic(vocabulary.things, config)
    return Said(classes, Segmentation(segment_map, np.array([s["label"] for s in segments], dtype=np.int64)))


def views_of(heard: Said, sample: EvalSample, classes: int) -> Views:
    """The ground truth and what was said, to be drawn."""
    views = [("ground truth", Segmentation(flat_map(sample.segment_map), sample.labels))]
    both = heard.classes is not None and heard.segments is not None
    if heard.classes is not None:
        views.append(
            ("prediction, semantic" if both else "prediction", Segmentation(heard.classes, np.arange(classes)))
        )
    if heard.segments is not None:
        views.append(("prediction, panoptic" if both else "prediction", heard.segments))
    return views


def flat_map(segment_map: NDArray[Any]) -> NDArray[Any]:
    """[L,H,W] -> [H,W]: where instances overlap, the lowest layer is what shows (PQ knows no overlap)."""
    flat = segment_map[0].copy()
    for layer in segment_map[1:]:
        np.copyto(flat, layer, where=(flat == NONE) & (layer >= 0))
    return flat


def class_map(flat: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.int64]:
    """Class of every pixel of a flat map, -1 where there is no segment."""
    return np.append(labels, -1)[np.maximum(flat, -1)]


def _own_score(heard: Said, sample: EvalSample, flat: NDArray[Any], vocabulary: Vocabulary) -> float | None:
    """The image's own PQ, or mIoU where there are no segments; over the classes that occur in it alone."""
    occurring = np.unique(sample.labels)
    if heard.segments is None:
        assert heard.classes is not None, "one of them is of every task"
        truth = class_map(flat, sample.labels)
        among, place = _among(occurring, len(vocabulary))
        counts = SemanticCounts(among)
        counts.update(place[heard.classes], place[truth])
        return counts.results()["mIoU"]
    among, place = _among(np.union1d(occurring, heard.segments.labels), len(vocabulary))
    own = PanopticCounts(among, [True] * among)
    labels = place[heard.segments.labels], place[sample.labels]
    judged, partly = _judged(heard.segments, sample)
    own.update(judged, labels[0], flat, labels[1], sample.crowd, place[partly])
    return own.results()["all"]["PQ"]


def _among(labels: NDArray[np.int64], classes: int) -> tuple[int, NDArray[np.int64]]:
    """How many classes these are, and the place of every class among them, int64 [K+1] (none: their number; -1: -1)."""
    place = np.full(classes + 1, len(labels), dtype=np.int64)
    place[labels] = np.arange(len(labels))
    place[-1] = -1
    return len(labels), place


def _add_segments(counts: PanopticCounts, said: Segmentation, sample: EvalSample, flat: NDArray[Any]) -> None:
    judged, partly = _judged(said, sample)
    counts.update(judged, said.labels, flat, sample.labels, sample.crowd, partly)


def _judged(said: Segmentation, sample: EvalSample) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The map of what was said, NONE where nobody looked for the class; the classes that are not marked throughout.

    As InstanceRecords keeps what was found: in a federated image only classes that are marked or known to be absent.
    """
    federated = sample.federated
    if federated is None:
        return said.segment_map, np.zeros(0, dtype=np.int64)
    looked_for = np.isin(said.labels, np.union1d(federated.negative, sample.labels))
    dropped = np.append(~looked_for, False)[np.maximum(said.segment_map, -1)]
    return np.where(dropped, NONE, said.segment_map), federated.not_exhaustive


def _panoptic_results(counts: PanopticCounts) -> dict[str, Any]:
    things: Sequence[bool] = counts.things.tolist()
    return PanopticCounts.from_array(comm.sum_array(counts.to_array()), things).results()
