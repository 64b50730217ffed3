"""Joining: stuff that was packed in several segments, as things or as several classes, becomes one segment an image."""

from __future__ import annotations

import numpy as np

from mf_scale.data.decode import StoredSample, none_value


def join_segments(
    stored_map: np.ndarray, sample: StoredSample, joined: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The stored map, labels, layers and crowd of the segments that are left, and which of them each segment is of now.

    `joined` bool [K]. A class whose segments lie on several layers of the map gets a layer of its own: on any other
    something may lie where it has to go. Stuff has no crowds: theirs are pixels of the class.
    """
    labels, layers, crowd = sample.labels, sample.segment_layer.copy(), sample.crowd.copy()
    first = np.arange(len(labels))
    for label in np.unique(labels[(labels >= 0) & joined[labels]]):
        own = np.flatnonzero(labels == label)
        first[own], crowd[own] = own[0], False
        if len(np.unique(layers[own])) > 1:
            stored_map = _on_a_layer_of_its_own(stored_map, own)
            layers[own] = len(stored_map) - 1
    left, group = np.unique(first, return_inverse=True)
    return stored_map, labels[left], layers[left], crowd[left], group


def _on_a_layer_of_its_own(stored_map: np.ndarray, segments: np.ndarray) -> np.ndarray:
    none = none_value(stored_map.dtype)
    here = np.isin(stored_map, segments)
    own = np.where(here.any(axis=0), segments[0], none).astype(stored_map.dtype)
    return np.concatenate([np.where(here, none, stored_map).astype(stored_map.dtype), own[None]])
