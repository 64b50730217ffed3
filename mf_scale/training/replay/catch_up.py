"""The steps between a checkpoint and the one to be looked at, trained in memory: one process, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mf_scale.data.batch import Batch
from mf_scale.distributed.gradients import LossScale, clip_divisor, norms_by_group
from mf_scale.fragments import Fragment, read_fragments
from mf_scale.losses.terms import StepLoss
from mf_scale.training.optimizer import build_optimizer
from mf_scale.training.replay.cuts import cut_of
from mf_scale.training.replay.plan import ReplayPlan
from mf_scale.training.replay.step import StepAgain, micro_batches
from mf_scale.training.schedule import lr_factor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def catch_up(
    plan: ReplayPlan,
    model: nn.Module,
    criterion: StepLoss,
    batches: Iterator[tuple[int, Batch]],
    loss_scale: LossScale,
    done: Callable[[], object],
) -> None:
    """Train `model` from the plan's checkpoint up to the step before the plan's; `done` after each step.

    A step that is not finite changes nothing, as in the run. To float tolerance the weights are the run's own.
    """
    config = plan.config
    optimizer = build_optimizer(model, config.optimizer)
    if plan.checkpoint is not None and plan.state.updates:
        _load_moments(model, optimizer, plan.checkpoint, plan.state.updates)
    updates = plan.state.updates
    for _ in range(plan.behind):
        step, batch = next(batches)
        again = StepAgain(
            model,
            criterion,
            batch,
            seed=config.seed,
            step=step,
            precision=config.train.precision,
            loss_scale=float(loss_scale.value),
        )
        model.zero_grad(set_to_none=True)
        cut = cut_of(plan.cuts, step + 1)
        for micro in micro_batches(batch, world=cut.world, size=cut.micro_batch):
            again.loss(micro).backward()
        factor = lr_factor(config.schedule, updates, config.train.steps)
        updates += _update(optimizer, factor, config.optimizer.clip_norm, loss_scale)
        done()


def _load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, updates: int) -> None:
    fragments = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moments = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in _MOMENTS}
            optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=parameter.device),
                **moments,
            }
            fragments.append(Fragment(name, 0, {kind: values.view(-1) for kind, values in moments.items()}))
    read_fragments(fragments, folder)


def _update(optimizer: torch.optim.Optimizer, factor: float, clip_norm: float, loss_scale: LossScale) -> bool:
    """Clip and apply, or leave out what is not finite; true where it was applied."""
    gradients: list[list[Tensor]] = []
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        gradients.append([p.grad for p in group["params"] if p.grad is not None])
    scale = loss_scale.value.clone()
    norm = (norms_by_group(gradients, scale.device, partitioned=False) / scale).square().sum().sqrt()
    finite = norm.isfinite()
    loss_scale.update(finite)
    if not finite:
        return False
    optimizer.grad_scale = scale * clip_divisor(norm, clip_norm)  # type: ignore[attr-defined]  # torch's fused AdamW
    optimizer.found_inf = torch.zeros_like(norm)  # type: ignore[attr-defined]
    optimizer.step()
    return True
