"""Looking: the first, best, median and worst images, found after the pass and drawn in a second look at these few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mf_scale.config.schema import Config
from mf_scale.data.index import Index
from mf_scale.data.loader import eval_samples_at
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.evaluation.counting import class_map, hear, views_of
from mf_scale.evaluation.forward import answer
from mf_scale.evaluation.troubles import named_samples, sample_trouble
from mf_scale.tracking.pictures import Picture, draw_segments, plain


@dataclass(frozen=True)
class Choice:
    """One image to be shown."""

    position: int
    why: str
    """first | best | median | worst."""
    score: float | None
    """Its own score, None where nothing of the task is in it."""


@dataclass(frozen=True)
class Shown:
    """One sample in pictures, on the rank that drew it."""

    choice: Choice
    key: str
    views: list[tuple[str, Picture]]
    maps: dict[str, NDArray[np.int64]]
    """Title of a view -> class of each pixel [H,W], -1: none."""


def choose(scores: NDArray[np.float64], first: int) -> list[Choice]:
    """The `first` first images, and half as many of the best, the median and the worst by score, each image once.

    `scores` [N], NaN for an image without one. Of equal scores the earlier image comes first.
    """
    ranked = [int(p) for p in np.argsort(scores, kind="stable") if not np.isnan(scores[p])]
    half, why = -(-first // 2), dict[int, str]()
    middle = sorted(range(len(ranked)), key=lambda place: (abs(2 * place - len(ranked) + 1), place))
    best = sorted(ranked, key=lambda position: (-scores[position], position))
    by_rank = {"worst": ranked, "best": best, "median": [ranked[place] for place in middle]}
    for name, positions in by_rank.items():
        free = [p for p in positions if p not in why]
        why.update(dict.fromkeys(free[:half], name))
    for position in range(min(first, len(scores))):
        why.setdefault(position, "first")
    order = ("first", "best", "median", "worst")
    shown = sorted(why, key=lambda p: (order.index(why[p]), p))
    return [Choice(p, why[p], None if np.isnan(scores[p]) else float(scores[p])) for p in shown]


def summed_scores(own: Sequence[tuple[int, float | None]], count: int) -> NDArray[np.float64]:
    """The scores of all `count` images from those of every rank, [N] with NaN for none; called by all ranks."""
    table = np.zeros((2, count))
    for position, score in own:
        table[:, position] = (0.0, 0.0) if score is None else (1.0, score)
    known, scores = comm.sum_array(table)
    return np.where(known > 0, scores, np.nan)


def look(
    model: nn.Module, index: Index, config: Config, world: World, choices: Sequence[Choice], count: int
) -> list[Shown]:
    """Predict and draw those of the chosen images that are this rank's."""
    own = [choice for choice in choices if choice.position % world.size == world.rank]
    names, shown = index.vocabulary.names, []
    places = [choice.position for choice in own]
    samples = named_samples(lambda: eval_samples_at(index, config.data, places, count), index, places)
    for choice, sample in zip(own, samples, strict=True):
        with sample_trouble(index, choice.position):
            heard = hear(answer(model, sample.image, config), index.vocabulary, config)
            views = views_of(heard, sample, len(names))
            drawn = [(title, draw_segments(sample.image, segments, names)) for title, segments in views]
            maps = {title: class_map(segments.segment_map, segments.labels) for title, segments in views}
            shown.append(Shown(choice, sample.key, [("image", plain(sample.image)), *drawn], maps))
    return shown
