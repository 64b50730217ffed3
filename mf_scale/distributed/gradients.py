"""Norms of a step's gradients, and what follows for the update: clipped, unscaled or left out, decided on the device.

torch's fused AdamW divides by a `grad_scale` tensor and leaves everything as it is where a `found_inf` tensor is 1. So
clipping by the global norm, the loss scale of fp16 and the skipping of a non-finite step cost no pass over the
gradients of their own, and the host never waits to learn what became of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_GROWTH_STEPS = 2000
"""Finite steps in a row after which the loss scale is doubled (torch's GradScaler: the same)."""
_FIRST_SCALE = 2.0**16


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did; tensors on the device, the same on every rank. Reading one waits for the step."""

    applied: Tensor
    """bool []: False where loss or gradients were not finite: nothing was changed, on any rank."""
    group_norms: Tensor
    """fp32 [G]: L2 norm of each parameter group's gradient, before clipping."""
    loss_scale: Tensor
    """fp32 []: by which the loss was multiplied (1 but in fp16)."""


class LossScale:
    """The dynamic loss scale of fp16: doubled after `_GROWTH_STEPS` finite steps in a row, halved by any other."""

    def __init__(self, device: torch.device, *, dynamic: bool) -> None:
        self._dynamic = dynamic
        self.value = torch.full((), _FIRST_SCALE if dynamic else 1.0, device=device)
        self._finite_steps = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> None:
        """Count one step, `finite` bool []."""
        if self._dynamic:
            counted = torch.where(finite, self._finite_steps + 1, 0.0)
            grown = counted >= _GROWTH_STEPS
            self.value *= torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5)
            self._finite_steps = torch.where(grown, 0.0, counted)

    def to_list(self) -> list[float]:
        """Scale and finite steps so far, for the checkpoint; empty where it is not dynamic. Waits for the device."""
        return [float(self.value), float(self._finite_steps)] if self._dynamic else []

    def load(self, saved: list[float]) -> None:
        """Take over what `to_list` gave; of another precision nothing is taken."""
        if self._dynamic and saved:
            self.value.fill_(saved[0])
            self._finite_steps.fill_(saved[1])


def norms_by_group(gradients: list[list[Tensor]], device: torch.device, *, partitioned: bool) -> Tensor:
    """L2 norm of each group's gradients, fp32 [G] on `device`; summed over the ranks where they are `partitioned`."""
    squares = [_square_of_norm(group, device) for group in gradients]
    total = torch.stack(squares)
    if partitioned and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.sqrt()


def _square_of_norm(group: list[Tensor], device: torch.device) -> Tensor:
    filled = [gradient for gradient in group if gradient.numel()]
    if not filled:
        return torch.zeros((), device=device)
    norms = torch.stack(torch._foreach_norm(filled)).float()
    return norms.square().sum().to(device)


def clip_divisor(norm: Tensor, clip_norm: float) -> Tensor:
    """What the gradients are divided by so that their global norm is at most `clip_norm` (0: 1, no clipping)."""
    return ((norm + 1e-6) / clip_norm).clamp(min=1.0) if clip_norm else torch.ones_like(norm)
