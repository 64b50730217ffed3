"""Targets: a stored map -> the segment map of a task, renumbered to the segments that are left in it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from mf_scale.data.batch import IGNORE, NONE
from mf_scale.data.decode import StoredSample, none_value
from mf_scale.data.joining import join_segments
from mf_scale.unify import LEFT_OUT


@dataclass(frozen=True)
class TargetRules:
    """How stored segments become targets; the same for all samples of a source."""

    task: str
    """panoptic: as packed; semantic: segments of a class joined; instance: stuff becomes NONE."""
    things: np.ndarray
    """bool [K]."""
    crowd: str
    """none | ignore: what crowd segments become; keep: they stay segments (evaluation)."""
    unlabelled: str
    """none | ignore: what pixels without any segment become."""
    joined: np.ndarray | None = None
    """bool [K]: stuff of which an image may hold several segments, which a panoptic target joins; None: none."""


@dataclass(frozen=True)
class Targets:
    """Targets of one image."""

    segment_map: np.ndarray
    """int16 [L,H,W]: segment index, NONE or IGNORE."""
    labels: np.ndarray
    """int64 [T]."""
    segment_layer: np.ndarray
    """int64 [T]."""
    crowd: np.ndarray
    """bool [T]; all false unless crowd segments are kept."""
    dropped: int
    """Segments of the task that have no pixel here."""


def make_targets(stored_map: np.ndarray, sample: StoredSample, rules: TargetRules) -> Targets:
    """Targets of (a crop of) the stored map of `sample`, uint8 or uint16 [L,h,w].

    In the semantic task a crowd's pixels are its class's, as in the usual conversion of panoptic data, and so are those
    of stuff that is joined. The pixels of segments that are left out of the vocabulary are ignored.
    """
    labels, layers, crowd = sample.labels, sample.segment_layer, sample.crowd
    none = none_value(stored_map.dtype)
    if rules.task == "semantic":
        stored_map = flatten_layers(stored_map, none)
        labels, group = np.unique(labels, return_inverse=True)
        layers, crowd = np.zeros(len(labels), np.int64), np.zeros(len(labels), bool)
    elif rules.task == "panoptic" and rules.joined is not None and (rules.joined[labels] & (labels >= 0)).any():
        stored_map, labels, layers, crowd, group = join_segments(stored_map, sample, rules.joined)
    else:
        group = np.arange(len(labels))
    kept = labels != LEFT_OUT
    if rules.crowd != "keep":
        kept &= ~crowd
    if rules.task == "instance":
        kept &= rules.things[labels]

    held = present_values(stored_map)[: len(group)]
    present = kept & (np.bincount(group, held, minlength=len(labels)) > 0)
    value = np.full(len(labels), NONE, np.int16)  # segments that the task drops
    if rules.crowd == "ignore":
        value[crowd] = IGNORE
    value[labels == LEFT_OUT] = IGNORE
    value[present] = np.arange(present.sum())
    table = np.full(none + 2, NONE, np.int16)
    table[: len(group)] = value[group]
    table[none] = IGNORE if rules.unlabelled == "ignore" else NONE
    table[none + 1] = IGNORE
    segment_map = look_up(table, stored_map)
    if len(segment_map) > 1:
        _settle_ignored(segment_map, stored_map[0] == none + 1)
    return Targets(segment_map, labels[present], layers[present], crowd[present], int(kept.sum() - present.sum()))


def present_values(stored_map: np.ndarray) -> np.ndarray:
    """Which values a uint8 or uint16 map holds, bool [256 or 65536]: those at the ends of its runs."""
    flat = stored_map.reshape(-1)
    found = np.zeros(np.iinfo(flat.dtype).max + 1, bool)
    found[flat[:-1][flat[1:] != flat[:-1]]] = True
    found[flat[-1:]] = True
    return found


def look_up(table: np.ndarray, stored_map: np.ndarray) -> np.ndarray:
    """`table[stored_map]` for a uint8 or uint16 map [L,h,w]."""
    if stored_map.dtype == np.uint8:  # np.take needs 3 times as long; OpenCV looks wider values up in its newest only
        layers, height, width = stored_map.shape
        return cv2.LUT(stored_map.reshape(layers * height, width), table).reshape(stored_map.shape)
    return np.take(table, stored_map)


def flatten_layers(stored_map: np.ndarray, none: int) -> np.ndarray:
    """One layer of several: at each pixel the lowest layer that has a segment there."""
    if len(stored_map) == 1:
        return stored_map
    flat = stored_map[0].copy()
    for layer in stored_map[1:]:
        np.copyto(flat, layer, where=(flat == none) & (layer < none))
    return flat[None]


def _settle_ignored(segment_map: np.ndarray, ignored: np.ndarray) -> None:
    """In place: a pixel is ignored iff layer 0 says so, and none is that still holds a segment on some layer."""
    held = (segment_map >= 0).any(axis=0)
    doubtful = (segment_map == IGNORE).any(axis=0)
    segment_map[segment_map == IGNORE] = NONE
    segment_map[0, (doubtful & ~held) | ignored] = IGNORE
