"""Federated annotation (LVIS) of one image in unified labels: what was looked for, and what was not marked through."""

from __future__ import annotations

import numpy as np

from mf_scale.unify.merge import LEFT_OUT, UnifiedSource


def unified_federation(
    source: UnifiedSource, present: np.ndarray, negative: np.ndarray, not_exhaustive: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unified labels that were looked for and not found in an image, and those not marked through, sorted int64.

    All three are source labels: classes with segments, looked for and absent, not marked through. A unified class of
    several source classes is absent only if all of them were looked for and none found; it is not marked through where
    one of them is not, or where one is present and another was not looked for.
    """
    absent, partial, found = (_flags(labels, source) for labels in (negative, not_exhaustive, present))
    missing = ~(absent | found)
    ways = [_reached(flags, source) for flags in (absent, partial, found, missing)]
    looked_absent, unmarked, held, unlooked = ways
    return np.flatnonzero(looked_absent & ~held & ~unlooked), np.flatnonzero(unmarked | (held & unlooked))


def _flags(labels: np.ndarray, source: UnifiedSource) -> np.ndarray:
    flags = np.zeros(len(source.labels), bool)
    flags[np.asarray(labels, np.int64)] = True
    return flags


def _reached(flags: np.ndarray, source: UnifiedSource) -> np.ndarray:
    """Unified classes of which some source class is flagged, bool [K]."""
    reached = np.zeros(len(source.known), bool)
    reached[source.labels[flags & (source.labels != LEFT_OUT)]] = True
    return reached
