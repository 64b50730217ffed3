"""An exponential moving average of the weights, kept where they are: whole up to ZeRO 2, in stretches at ZeRO 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mf_scale.distributed.engine import Engine
from mf_scale.fragments import Fragment


class Ema:
    """The average of the trained weights. Buffers and frozen weights are not averaged: the model's own go with it."""

    def __init__(self, engine: Engine, decay: float) -> None:
        """Start at the present weights."""
        self._engine, self._decay = engine, decay
        self._average = {name: weights.detach().clone() for name, weights in engine.weights().items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take the weights after update number `updates` (from 1) in.

        The decay ramps up as (1 + updates) / (10 + updates), so that the first weights are soon forgotten.
        """
        decay = min(self._decay, (1 + updates) / (10 + updates))
        weights = self._engine.weights()
        torch._foreach_lerp_(list(self._average.values()), [weights[n] for n in self._average], 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the average as its weights, and its own again at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        weights = self._engine.weights()
        for name, average in self._average.items():
            mine = weights[name].clone()
            weights[name].copy_(average)
            average.copy_(mine)
        self._engine.weights_replaced()

    def state(self) -> dict[str, Tensor]:
        """What the model's state_dict would be with the average; up to ZeRO 2."""
        return {**self._engine.replicated(), **self._average}

    def fragments(self) -> Iterator[Fragment]:
        """Views into the average, of kind `ema`."""
        starts = self._engine.weight_starts()
        for name, average in self._average.items():
            yield Fragment(name, starts.get(name, 0), {"ema": average.view(-1)})
