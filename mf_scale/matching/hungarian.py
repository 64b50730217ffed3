"""Optimal assignment of queries to segments: one copy to the host, scipy, one copy back."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mf_scale.data.batch import NO_LABEL, Batch
from mf_scale.errors import GuardError
from mf_scale.matching.cost import PairwiseCost

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Matching:
    """Matched pairs of a batch, image by image, within an image layer by layer.

    Rows are padded to P >= 1 pairs; a padding pair has its image's last slot, segment T (behind the last) and layer 0.
    """

    slots: Tensor
    """int64 [B,P]: (b * S + s) * Q + q, the query's place in the stacked layers of all images."""
    segments: Tensor
    """int64 [B,P]: index of the segment in its image."""
    layers: Tensor
    """int64 [B,P]: layer of the map that holds the segment."""
    labels: Tensor
    """int64 [B,S*Q]: class of the segment a query is matched with, NO_LABEL where there is none."""
    counts: Tensor
    """int64 [B]: real pairs of each image, over all layers: S * min(T, Q)."""
    matched: int
    """Segments that have a query in a layer: sum of min(T, Q)."""
    surplus: int
    """Segments beyond the queries, which no layer can match: sum of max(0, T - Q)."""
    nonfinite: list[dict[str, Any]]
    """What the warn policy replaced: layer, key (of the image), queries (range), term."""


def match(cost: PairwiseCost, batch: Batch, policy: str) -> Matching:
    """Solve all layers and images of a batch by their total cost.

    `policy` is for non-finite costs: warn logs and replaces them by a cost above all finite ones; strict raises
    GuardError. Both name decoder layer, image key, query range and cost term.
    """
    B, S, Q, _ = cost.total.shape
    totals, labels, layers = _to_host(cost, batch)
    counts = [int(n) for n in (labels != NO_LABEL).sum(axis=1)]
    nonfinite = [] if np.isfinite(totals).all() else _describe_nonfinite(cost, counts, batch)
    if nonfinite:
        _report(nonfinite, policy)
    pairs = [_solve_image(totals[b, :, :, : counts[b]]) for b in range(B)]
    tables = _tables(pairs, labels, layers, S * Q)
    # All in one copy; its parts are contiguous, so no kernel has to copy them again.
    flat = torch.from_numpy(np.concatenate([t.ravel() for t in tables])).to(cost.total.device, non_blocking=True)
    views = [v.view(t.shape) for v, t in zip(flat.split([t.size for t in tables]), tables, strict=True)]
    slots, segments, own_layers, matched, pairs_of_images = views
    return Matching(
        slots=slots,
        segments=segments,
        layers=own_layers,
        labels=matched,
        counts=pairs_of_images,
        matched=sum(min(t, Q) for t in counts),
        surplus=sum(max(0, t - Q) for t in counts),
        nonfinite=nonfinite,
    )


def solve(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries and segments of the cheapest assignment for one cost [Q,T]; non-finite entries are the most expensive."""
    cost = cost.astype(np.float64)  # in fp32, 1 more than a large cost is the same cost
    finite = np.isfinite(cost)
    if not finite.all():
        cost = np.where(finite, cost, 2 * np.abs(cost[finite]).max(initial=0.0) + 1.0)
    queries, segments = linear_sum_assignment(cost)
    return queries, segments


def _to_host(cost: PairwiseCost, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Total costs [B,S,Q,T], labels and map layers [B,T] in a single copy, as bytes: numbers of two types, no cast."""
    parts = (batch.labels, batch.segment_layer, cost.total)
    host = torch.cat([part.flatten().view(torch.int32) for part in parts]).cpu().numpy()
    size = 2 * batch.labels.numel()  # an int64 is two int32
    labels, layers = (host[i * size : (i + 1) * size].view(np.int64).reshape(batch.labels.shape) for i in range(2))
    dtype = np.float64 if cost.total.dtype == torch.float64 else np.float32
    return host[2 * size :].view(dtype).reshape(cost.total.shape), labels, layers


def _tables(pairs: list[np.ndarray], labels: np.ndarray, layers: np.ndarray, queries: int) -> list[np.ndarray]:
    """slots, segments, layers, labels and counts of `Matching` from each image's pairs; `queries` of all layers."""
    (B, T), widest = labels.shape, max(1, *(len(found) for found in pairs))
    slots, segments, own_layers = (np.zeros((B, widest), np.int64) for _ in range(3))
    matched = np.full((B, queries), NO_LABEL, np.int64)
    for b, found in enumerate(pairs):
        n, (own, segment) = len(found), found.T
        slots[b], segments[b] = (b + 1) * queries - 1, T
        slots[b, :n], segments[b, :n], own_layers[b, :n] = b * queries + own, segment, layers[b, segment]
        matched[b, own] = labels[b, segment]
    return [slots, segments, own_layers, matched, np.array([len(found) for found in pairs], np.int64)]


def _solve_image(totals: np.ndarray) -> np.ndarray:
    """Pairs (slot, segment) [P,2] of one image's costs [S,Q,T], layer by layer."""
    found = [solve(layer) for layer in totals]
    Q = totals.shape[1]
    slots = np.concatenate([s * Q + queries for s, (queries, _) in enumerate(found)])
    return np.stack((slots, np.concatenate([segments for _, segments in found])), axis=1)


def _describe_nonfinite(cost: PairwiseCost, counts: list[int], batch: Batch) -> list[dict[str, Any]]:
    """Where and in which term costs are not finite; reads the terms from the device, so only on that occasion."""
    found = []
    for term, values in (("class", cost.class_cost), ("focal", cost.focal), ("dice", cost.dice)):
        bad = ~np.isfinite(values.cpu().numpy())
        for b, count in enumerate(counts):
            for layer, rows in enumerate(bad[b, :, :, :count].any(axis=2)):
                if rows.any():
                    queries = np.flatnonzero(rows)
                    place = {
                        "layer": layer,
                        "key": batch.keys[b],
                        "queries": f"{queries[0]}-{queries[-1]}",
                        "term": term,
                    }
                    found.append(place)
    return found


def _report(nonfinite: list[dict[str, Any]], policy: str) -> None:
    shown = "; ".join("layer {layer}, image {key}, queries {queries}, {term} cost".format(**n) for n in nonfinite[:5])
    more = f"; and {len(nonfinite) - 5} more" if len(nonfinite) > 5 else ""
    if policy == "strict":
        raise GuardError(
            f"the matching cost is not finite: {shown}{more}",
            where="matching.nonfinite=strict",
            remedy="Look at the image and the weights; matching.nonfinite=warn goes on past it.",
        )
    logger.warning("the matching cost is not finite and was replaced by a large one: %s%s", shown, more)
