"""A replay cuts each global batch as the ranks of its step did: a micro-batch has the samples and the lane it had."""

from __future__ import annotations

import json
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mf_scale.config.load import load_config
from mf_scale.data.batch import NO_LABEL
from mf_scale.data.collate import cut
from mf_scale.data.loader import train_steps
from mf_scale.distributed.gradients import LossScale
from mf_scale.training.replay import catch_up as catching
from mf_scale.training.replay.cuts import Cut, cut_of, read_cuts
from mf_scale.training.replay.step import micro_batches
from tests.sources import make_source, open_state, small_config


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 2), (4, 1), (2, 4), (1, 8)])
def test_the_micro_batches_are_those_of_the_ranks(tmp_path, world, size):
    index, config = make_source(tmp_path, [9, 6, 8]), small_config()
    state = open_state(index, config, 8)

    def batch(rank: int, ranks: int):
        with closing(train_steps([index], state, config, rank=rank, world=ranks, step=5)) as steps:
            return next(steps)[1]

    found = list(micro_batches(batch(0, 1), world=world, size=size))
    wanted = [
        (rank, number, rank + world * number * size, cut(batch(rank, world), number * size, (number + 1) * size))
        for rank in range(world)
        for number in range(8 // world // size)
    ]
    assert [(m.rank, m.number, m.lane) for m in found] == [facts[:3] for facts in wanted]
    for micro, (*_, part) in zip(found, wanted, strict=True):
        assert micro.batch.keys == part.keys
        assert torch.equal(micro.batch.images, part.images) and torch.equal(micro.batch.segment_map, part.segment_map)
        width = part.labels.shape[1]
        assert torch.equal(micro.batch.labels[:, :width], part.labels)
        assert (micro.batch.labels[:, width:] == NO_LABEL).all()


def start(step: int, world: int, micro_batch: int = 1) -> dict[str, Any]:
    return {"event": "start", "step": step, "world": world, "micro_batch": micro_batch}


def test_every_step_has_the_cut_of_the_start_that_took_it():
    """The third start went back behind the second one: from step 5 on its own cut counts, whatever came before."""
    cuts = (Cut(0, 2, 4), Cut(8, 4, 2), Cut(4, 1, 8))
    assert [cut_of(cuts[:2], step).world for step in (1, 8, 9, 99)] == [2, 2, 4, 4]
    assert [cut_of(cuts, step).world for step in (1, 4, 5, 8, 9, 99)] == [2, 2, 1, 1, 1, 1]


def test_steps_that_no_start_tells_of_are_cut_as_by_the_writer_of_the_checkpoint(tmp_path):
    """12 samples over 4 ranks are 3 each, of which micro-batches of 2 make single ones; today's global batch is 8."""
    index, config = make_source(tmp_path, [9, 6, 8]), small_config()
    wanted = load_config(None, ["train.global_batch=8", "train.micro_batch=2"])
    (tmp_path / "manifest.json").write_text(json.dumps({"world": 4}))
    state = open_state(index, config, 12)
    for starts in ([], [start(8, 2)]):
        cuts = read_cuts(starts, tmp_path, 4, state, wanted)
        assert cut_of(cuts, 5) == Cut(4, 4, 1)
    assert cut_of(cuts, 9) == Cut(8, 2, 1)
    assert read_cuts([start(4, 2), start(8, 1)], tmp_path, 4, state, wanted) == (Cut(4, 2, 1), Cut(8, 1, 1))
    assert cut_of(read_cuts([start(8, 2, 3)], None, 0, state, wanted), 1) == Cut(0, 2, 3), (
        "a log without its first lines"
    )


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(images.float().mean((2, 3)))
        return out


class _Criterion:
    """As much of a criterion as a step needs: the sum of what the model makes of the images."""

    names: tuple[str, ...] = ()

    def totals(self, _: Any) -> tuple[()]:
        return ()

    def normalisers(self, _: Any) -> None:
        return None

    def __call__(self, prediction: torch.Tensor, *_: Any) -> Any:
        return SimpleNamespace(total=prediction.square().mean(), terms={})


def test_catching_up_over_a_change_of_world_size_cuts_each_step_with_its_own(tmp_path, monkeypatch):
    """Two ranks took steps 1 and 2, four took step 3; the step looked at, 4, is not trained."""
    index, config = make_source(tmp_path, [9, 6, 8]), small_config()
    state, seen = open_state(index, config, 8), []

    def cut_as(batch, *, world, size):
        seen.append((world, size))
        return micro_batches(batch, world=world, size=size)

    monkeypatch.setattr(catching, "micro_batches", cut_as)
    plan: Any = SimpleNamespace(
        config=load_config(None, ["train.precision=fp32", "train.steps=4"]),
        checkpoint=None,
        state=SimpleNamespace(updates=0),
        behind=3,
        cuts=(Cut(0, 2, 4), Cut(2, 4, 1)),
    )
    criterion: Any = _Criterion()
    model = _Model()
    before = model.linear.weight.detach().clone()
    with closing(train_steps([index], state, config, rank=0, world=1, step=0)) as batches:
        catching.catch_up(plan, model, criterion, batches, LossScale(torch.device("cpu"), dynamic=False), lambda: None)
    assert seen == [(2, 4), (2, 4), (4, 1)]
    assert not torch.equal(model.linear.weight, before)
