"""Turns: every rank takes its next image, and before each turn all agree whether to go on."""

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
    stop: Callable[[], bool] | None,
    taken: Callable[[], object] = lambda: None,
) -> bool:
    """`action(turn, item)` of every item; every rank has as many. False where a rank was asked to stop.

    With `stop` the ranks agree before every turn. One that met a UserError stays until the next agreement, at which
    all leave; it then raises, so that no rank waits in a collective that another has left.
    """
    failure: UserError | None = None
    turn = 0
    while True:
        if stop is not None:
            stopped, failed = agreement(stop(), failure is not None)
            if failed:
                break
            if stopped:
                return False
        try:
            item = next(items, None)
            if item is None:
                break
            action(turn, item)
        except UserError as error:
            if stop is None:
                raise
            failure = error
        taken()
        turn += 1
    if failure is not None:
        raise failure
    return True


def agreement(*said: bool) -> list[bool]:
    """Of each of these whether any rank said so; the same on every rank."""
    return [bool(count) for count in comm.sum_array(np.array(said, dtype=np.int64))]
