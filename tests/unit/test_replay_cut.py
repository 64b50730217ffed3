"""A replay cuts the global batch as the ranks of the run did: each micro-batch has the samples and the lane it had."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from mf_scale.data.batch import NO_LABEL
from mf_scale.data.collate import cut
from mf_scale.data.loader import train_steps
from mf_scale.training.replay.step import micro_batches
from tests.sources import make_source, open_state, small_config


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 2), (4, 1), (2, 4), (1, 8)])
def test_the_micro_batches_are_those_of_the_ranks(tmp_path, world, size):
    index, config = make_source(tmp_path, [9, 6, 8]), small_config()
    state = open_state(index, config, 8)

    def batch(rank: int, ranks: int):
        with closing(train_steps(index, state, config, seed=3, rank=rank, world=ranks, step=5)) as steps:
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
