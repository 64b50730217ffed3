"""Turns: every rank takes its next item, and before each turn all agree whether to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from mf_scale.distributed import comm
from mf_scale.errors import UserError

Item = TypeVar("Item")


def in_turns(
    items: Iterator[Item],
    action: Callable[[int, Item], None],
    stop: Callable[[], bool] = lambda: False,
    taken: Callable[[], object] = lambda: None,
) -> bool:
    """`action(turn, item)` of every item; the ranks may have different numbers. False where a rank was asked to stop.

    Before every turn the ranks agree whether one was asked to stop (`stop`, which may hold collectives, is called by
    all), has failed, or has an item left. One that met a UserError waits for that, then all leave and it raises: no
    rank sits in a collective that another will never enter. `taken` is called after every turn on every rank.
    """
    failure: UserError | None = None
    turn = 0
    while True:
        item: Item | None = None
        if failure is None:
            try:
                item = next(items, None)
            except UserError as error:
                failure = error
        stopped, failed, more = agreement(stop(), failure is not None, item is not None)
        if failed or stopped or not more:
            break
        try:
            if item is not None:
                action(turn, item)
        except UserError as error:
            failure = error
        taken()
        turn += 1
    if failure is not None:
        raise failure
    return failed or not stopped


def agreement(*said: bool) -> list[bool]:
    """Of each of these whether any rank said so; the same on every rank."""
    return [bool(count) for count in comm.sum_array(np.array(said, dtype=np.int64))]
