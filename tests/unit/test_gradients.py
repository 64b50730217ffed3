"""Clipping, unscaling and skipping, as torch's fused AdamW does them on our orders."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mf_scale.distributed.gradients import LossScale, clip_divisor, norms_by_group

CPU = torch.device("cpu")


def test_norms_are_those_of_torch_by_group() -> None:
    groups = [[torch.randn(3, 4), torch.randn(5)], [torch.randn(7)], [], [torch.zeros(0), torch.randn(2)]]
    norms = norms_by_group(groups, CPU, partitioned=False)
    for norm, group in zip(norms, groups, strict=True):
        flat = torch.cat([t.flatten() for t in group]) if group else torch.zeros(1)
        assert float(norm) == pytest.approx(float(flat.norm()), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_shows_in_its_group_alone(bad: float) -> None:
    norms = norms_by_group([[torch.ones(9)], [torch.ones(3), torch.tensor([1.0, bad])]], CPU, partitioned=False)
    assert norms.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(("norm", "clip"), [(4.0, 1.0), (0.5, 1.0), (1.0, 1.0), (3.0, 0.01)])
def test_clipping_is_torchs(norm: float, clip: float) -> None:
    parameter = nn.Parameter(torch.zeros(16))
    gradient = torch.full((16,), norm / 4)
    parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_([parameter], clip)
    torch.testing.assert_close(gradient / clip_divisor(gradient.norm(), clip), parameter.grad)


def test_no_clip_norm_does_not_clip() -> None:
    assert float(clip_divisor(torch.tensor(1e9), 0.0)) == 1.0


def test_the_fused_optimizer_divides_and_leaves_out() -> None:
    """What the engine relies on: `grad_scale` divides, `found_inf` keeps weights, moments and the count of updates."""
    ours, plain = (nn.Parameter(torch.arange(8.0)) for _ in range(2))
    fused, reference = (torch.optim.AdamW([p], lr=0.1, fused=True) for p in (ours, plain))
    for step in range(4):
        gradient = torch.randn(8, generator=torch.Generator().manual_seed(step))
        left_out = step == 2
        ours.grad = gradient * (math.nan if left_out else 64.0)
        fused.grad_scale, fused.found_inf = torch.tensor(64.0), torch.tensor(float(left_out))  # type: ignore[attr-defined]
        fused.step()
        if not left_out:
            plain.grad = gradient
            reference.step()
        assert torch.equal(ours, plain)
    assert float(fused.state[ours]["step"]) == 3


def test_the_loss_scale_halves_at_once_and_doubles_after_long() -> None:
    scale = LossScale(CPU, dynamic=True)
    first = float(scale.value)
    scale.update(torch.tensor(False))
    assert float(scale.value) == first / 2
    for _ in range(1999):
        scale.update(torch.tensor(True))
    assert float(scale.value) == first / 2
    saved = scale.to_list()
    scale.update(torch.tensor(True))
    assert float(scale.value) == first
    resumed = LossScale(CPU, dynamic=True)
    resumed.load(saved)
    resumed.update(torch.tensor(True))
    assert resumed.to_list() == scale.to_list() == [first, 0.0]


def test_only_fp16_scales() -> None:
    scale = LossScale(CPU, dynamic=False)
    scale.load([4096.0, 3.0])  # the run was in fp16 before
    scale.update(torch.tensor(False))
    assert (scale.to_list(), float(scale.value)) == ([], 1.0)
    into_fp16 = LossScale(CPU, dynamic=True)
    into_fp16.load(scale.to_list())
    assert into_fp16.to_list()[0] == 65536
