"""Statistics of batch norms that are not frozen: a step without an update leaves them as they were.

They move in the forward pass, so a forward pass that was not finite would make them NaN for the rest of the run, unseen
until the model is evaluated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MovingStatistics:
    """The statistics that training moves, and what they were before the step."""

    def __init__(self, model: nn.Module) -> None:
        """`model` in training mode, as it is trained."""
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        statistics = [[norm.running_mean, norm.running_var] for norm in norms if norm.track_running_stats]
        self._moving: list[Tensor] = [tensor for pair in statistics for tensor in pair if tensor is not None]
        self._before = [tensor.clone() for tensor in self._moving]

    @torch.no_grad()
    def end_step(self, applied: Tensor) -> None:
        """Keep the step's statistics where `applied` (bool [], on the device) is true, else take it back."""
        if not self._moving:
            return
        for tensor, before in zip(self._moving, self._before, strict=True):
            tensor.copy_(torch.where(applied, tensor, before))
        torch._foreach_copy_(self._before, self._moving)
