"""The step itself, micro-batch after micro-batch in one process, under anomaly detection. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mf_scale.data.batch import Batch
from mf_scale.data.loader import train_steps
from mf_scale.distributed.gradients import LossScale
from mf_scale.errors import GuardError
from mf_scale.losses.choose import choose_criterion
from mf_scale.losses.terms import StepLoss
from mf_scale.training.class_rows import class_images
from mf_scale.training.initial import initial_model
from mf_scale.training.optimizer import parameter_groups
from mf_scale.training.precision import set_numerics
from mf_scale.training.replay.catch_up import catch_up
from mf_scale.training.replay.nonfinite import FirstModule, all_finite, backward_with_anomaly_detection
from mf_scale.training.replay.plan import ReplayPlan
from mf_scale.training.replay.step import MicroBatch, StepAgain, micro_batches


@dataclass
class Replayed:
    """What one micro-batch gave."""

    micro: MicroBatch
    terms: dict[str, float] = field(default_factory=dict)
    """Loss terms by name; empty where no loss was reached."""
    norm: float = float("nan")
    """L2 norm of its own gradient."""
    findings: list[str] = field(default_factory=list)
    """Where values stopped being finite."""

    @property
    def finite(self) -> bool:
        """True where nothing at all was found."""
        values = torch.tensor([*self.terms.values(), self.norm], dtype=torch.float64)
        return bool(self.terms) and not self.findings and all_finite(values)


@dataclass(frozen=True)
class ReplayedStep:
    """What the step gave."""

    parts: list[Replayed]
    group_norms: dict[str, float]
    """L2 norm of the summed gradient by parameter group, before clipping."""
    bad_weights: list[str]
    """Parameters and buffers that were not finite before the step."""

    @property
    def finite(self) -> bool:
        """True where loss and gradients are finite everywhere, so that the step would be applied."""
        norms = torch.tensor(list(self.group_norms.values()))
        return all(part.finite for part in self.parts) and all_finite(norms)


def replay(plan: ReplayPlan, device: torch.device, *, catching_up: bool, done: Callable[[], object]) -> ReplayedStep:
    """Run the step of `plan`; `catching_up` trains the steps from its checkpoint on first, `done` after each of them.

    Raises UserError for weights or data that are not there any more.
    """
    set_numerics(plan.config, device)
    model, _ = initial_model(plan.config, plan.sources[0].vocabulary, plan.checkpoint)
    model.to(device).train()
    criterion = choose_criterion(plan.config, len(plan.sources[0].vocabulary), class_images(plan.sources))
    loss_scale = LossScale(device, dynamic=plan.config.train.precision == "fp16")
    if plan.loss_scale is not None:
        loss_scale.load(plan.loss_scale)
    first = plan.state.step if catching_up else plan.step - 1
    data = replace(plan.config.data, workers=0)  # whoever reads: one process, one stream of all ranks' samples
    with closing(train_steps(plan.sources, plan.data, data, rank=0, world=1, step=first)) as batches:
        if catching_up:
            catch_up(plan, model, criterion, batches, loss_scale, done)
        _, batch = next(batches)
    return _look_at_step(plan, model, criterion, batch, float(loss_scale.value))


def _look_at_step(
    plan: ReplayPlan, model: nn.Module, criterion: StepLoss, batch: Batch, loss_scale: float
) -> ReplayedStep:
    bad = [name for name, values in model.state_dict().items() if not all_finite(values)]
    config = plan.config
    again = StepAgain(
        model,
        criterion,
        batch,
        seed=config.seed,
        step=plan.step - 1,
        precision=config.train.precision,
        loss_scale=loss_scale,
    )
    parts = []
    sums = {id(p): torch.zeros_like(p, requires_grad=False) for p in model.parameters() if p.requires_grad}
    for micro in micro_batches(batch, world=plan.cut.world, size=plan.cut.micro_batch):
        model.zero_grad(set_to_none=True)
        parts.append(_look_at(again, model, micro, loss_scale))
        for parameter in model.parameters():
            if parameter.grad is not None:
                sums[id(parameter)] += parameter.grad / loss_scale
    groups = parameter_groups(model, config.optimizer)
    norms = {group["name"]: float(_norm([sums[id(p)] for p in group["params"]])) for group in groups}
    return ReplayedStep(parts, norms, bad)


def _look_at(again: StepAgain, model: nn.Module, micro: MicroBatch, loss_scale: float) -> Replayed:
    """One micro-batch; leaves its gradient in the parameters."""
    result, module = Replayed(micro), FirstModule()
    operator = None
    try:
        with module.watch(model):
            operator = backward_with_anomaly_detection(lambda: again.loss(micro))
        if operator is not None:
            # Anomaly detection ends at the first operator it finds: the gradient is made without it.
            model.zero_grad(set_to_none=True)
            again.loss(micro).backward()
    except GuardError as error:  # matching.nonfinite is strict
        result.findings.append(error.what)
    result.terms = {name: float(value) for name, value in again.terms.items()}
    gradients = [p.grad / loss_scale for p in model.parameters() if p.grad is not None]
    result.norm = float(_norm(gradients)) if gradients else float("nan")
    if module.found:
        result.findings.append(f"first output that is not finite: {module.found}")
    if operator:
        result.findings.append(f"first gradient that is NaN: {operator}")
    return result


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.stack([gradient.float().norm() for gradient in gradients]).norm()
