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

    Rows are padded to P >= 1 pairs; a padding pair has slot S*Q and segment T, one behind the last of each.
    """

    slots: Tensor
    """int64 [B,P]: s * Q + q, the query's place in the stacked layers."""
    segments: Tensor
    """int64 [B,P]: index of the segment in its image."""
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
    B, S, Q, T = cost.total.shape
    totals, counts = _to_host(cost, batch)
    nonfinite = [] if np.isfinite(totals).all() else _describe_nonfinite(cost, counts, batch)
    if nonfinite:
        _report(nonfinite, policy)
    pairs = [_solve_image(totals[b, :, :, : counts[b]]) for b in range(B)]
    widest = max(1, *(len(p) for p in pairs))
    table = np.empty((2, B, widest + 1), dtype=np.int64)  # the last column carries the counts, so one copy goes back
    table[0], table[1] = S * Q, T
    for b, found in enumerate(pairs):
        table[:, b, : len(found)] = found.T
        table[:, b, widest] = len(found)
    slots, segments = torch.from_numpy(table).to(cost.total.device, non_blocking=True)
    return Matching(
        slots=slots[:, :widest],
        segments=segments[:, :widest],
        counts=slots[:, widest],
        matched=sum(min(t, Q) for t in counts),
        surplus=sum(max(0, t - Q) for t in counts),
        nonfinite=nonfinite,
    )


def solve(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries and segments of the cheapest assignment for one cost [Q,T]; non-finite entries are the most expensive."""
    finite = np.isfinite(cost)
    if not finite.all():
        cost = np.where(finite, cost, np.abs(cost[finite]).max(initial=0.0) + 1.0)
    queries, segments = linear_sum_assignment(cost)
    return queries, segments


def _to_host(cost: PairwiseCost, batch: Batch) -> tuple[np.ndarray, list[int]]:
    """Total costs and each image's segment count in a single copy."""
    counts = (batch.labels != NO_LABEL).sum(dim=1)
    host = torch.cat((cost.total.flatten(), counts.to(cost.total.dtype))).cpu().numpy()
    split = cost.total.numel()
    return host[:split].reshape(cost.total.shape), [int(n) for n in host[split:]]


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
