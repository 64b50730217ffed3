"""A step without an update leaves the statistics of batch norms as they were."""

from __future__ import annotations

import torch
from torch import nn

from mf_scale.training.statistics import MovingStatistics


def test_a_forward_pass_that_is_not_finite_is_taken_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()
    model[2].eval()  # frozen: never moves
    statistics = MovingStatistics(model)
    model(torch.randn(2, 3, 5, 5))
    statistics.end_step(torch.tensor(True))
    good = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    model(torch.full((2, 3, 5, 5), float("nan")))
    moved = dict(model.named_buffers())
    assert not moved["1.running_mean"].isfinite().all()
    statistics.end_step(torch.tensor(False))
    assert all(torch.equal(value, good[name]) for name, value in model.named_buffers() if name in good)
    model(torch.randn(2, 3, 5, 5))
    statistics.end_step(torch.tensor(True))
    assert not torch.equal(moved["1.running_mean"], good["1.running_mean"])
    assert torch.equal(moved["2.running_mean"], good["2.running_mean"])


def test_a_model_without_moving_statistics_costs_nothing() -> None:
    statistics = MovingStatistics(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))
    statistics.end_step(torch.tensor(False))
    assert statistics._moving == []
