"""The arithmetic of `mf-scale plan`: states by stage, what fits, time, cores, checkpoints, sizes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mf_scale.config.schema import Config
from mf_scale.config.validate import BatchPlan
from mf_scale.errors import UserError
from mf_scale.plan.activations import Activations
from mf_scale.plan.checkpoints import count_checkpoints
from mf_scale.plan.fit import advice, fit, layouts, needed, needs, usable_of
from mf_scale.plan.sizes import GIB, divisors, parse_size, shown
from mf_scale.plan.stand_ins import FusedAttention
from mf_scale.plan.states import Layout, Tensors, count_states
from mf_scale.plan.time import Rate, cores, duration
from mf_scale.plan.tracker import Tracker
from mf_scale.plan.written import Written

TENSORS = Tensors(groups=((50, 31), (10, 9)), frozen=(7,), buffers=12, saved=440)
"""100 trained elements in groups of 81 and 19, which four ranks share as 88 and 24."""


def held(stage: int, **more: Any) -> tuple[dict[str, int], dict[str, int]]:
    states = count_states(TENSORS, Layout(stage, **{"ranks": 4, "bucket": 1000, **more}))
    gpu, host = ({n: v for n, v in vars(where).items() if v} for where in (states.gpu, states.host))
    return gpu, host


def test_states_by_stage() -> None:
    """By hand, in bytes; `test_plan_memory.py` holds them to DeepSpeed's own tensors."""
    assert held(0) == ({"weights": 440, "gradients": 400, "moments": 800}, {})
    flat = {"weights": 4 * (88 + 24 + 7) + 12, "master": 4 * 28, "moments": 8 * 28, "buckets": 4000}
    assert held(1) == ({**flat, "gradients": 400}, {})
    # Shares of 22 and of 6. The third rank's touch both of the first group and the second of the other: 50 + 31 + 9.
    assert held(2) == ({**flat, "gradients": 4 * 90}, {})
    assert held(2, accumulation=2) == ({**flat, "gradients": 8 * 90}, {})
    share = 4 * (13 + 8 + 3 + 3)
    sharded = {"weights": share + 4 * 2 + 12, "gradients": share, "master": share, "moments": 2 * share}
    assert held(3) == ({**sharded, "buckets": 4000, "gathered": 4 * (52 + 32 + 12 + 12 + 8)}, {})


def test_offloading_moves_and_copies() -> None:
    gpu, host = held(2, offload_optimizer=True, accumulation=2)
    assert gpu == {"weights": 4 * 119 + 12, "buckets": 4000 + 4 * 50}
    assert host == {"gradients": 112 + 360, "master": 112, "moments": 224, "buckets": 112 + 200}
    gpu, host = held(3, offload_optimizer=True, offload_parameters=True)
    assert set(gpu) == {"weights", "buckets", "gathered"} and gpu["weights"] == 4 * 2 + 12
    assert host["weights"] == 108 and host["gradients"] == 216


def test_only_what_stays_whole_is_gathered_of_a_model_larger_than_what_may_live() -> None:
    gpu, _ = held(3, most_live=30, persistent=12)
    assert gpu["gathered"] == 4 * max(12 + 12 + 8, 30)
    assert "gathered" not in held(3, ranks=1)[0]


def test_a_layout_is_what_deepspeed_is_told() -> None:
    config = Config()
    config.zero.bucket_mib, config.zero.offload_optimizer, config.ema.decay = 3, True, 0.5
    config.deepspeed = {"zero_optimization": {"overlap_comm": True}}
    found = layouts(config, BatchPlan(16, 2, 2, 4), offloads=False)
    assert [(x.stage, x.offload_optimizer, x.overlap) for x in found] == [
        (0, False, False),
        (1, True, False),
        (2, True, True),  # the additions are for the configured stage
        (3, True, False),
    ]
    assert all(x.bucket == 3 * 2**18 and x.ema and x.accumulation == 2 and x.ranks == 4 for x in found)
    assert [x.name for x in layouts(config, BatchPlan(16, 2, 2, 4), offloads=True)][-1].endswith("weights offloaded")


BIG = Tensors(groups=((GIB,),), frozen=(), buffers=0)
"""4 GiB of weights."""
PLAN = BatchPlan(48, 2, 3, 8)
"""Six samples a rank."""


def grow(micro_batch: int) -> Activations:
    """3 GiB an image."""
    return Activations(micro_batch, 0, 3 * GIB * micro_batch, 0)


def found_for(memory: int) -> tuple[int | None, ...]:
    return tuple(need.largest for need in needs(Config(), PLAN, BIG, grow, memory, offloads=False))


def test_the_largest_micro_batch_is_one_that_the_global_batch_allows() -> None:
    """Six samples a rank are cut by 6, 3, 2 or 1."""
    assert found_for(80 * GIB) == (6, 6, 6, 6)
    sizes = found_for(32 * GIB)
    assert all(size in (None, 1, 2, 3, 6) for size in sizes)
    for need, size in zip(needs(Config(), PLAN, BIG, grow, 32 * GIB, offloads=False), sizes, strict=True):
        for tried in (1, 2, 3, 6):
            layout = replace(need.states.layout, accumulation=6 // tried)
            fits = needed(count_states(BIG, layout), grow(tried)) <= usable_of(32 * GIB)
            assert fits == (tried <= (size or 0))


def test_the_smallest_stage_that_takes_the_configured_micro_batch_is_chosen() -> None:
    def chosen(memory: int) -> tuple[int, int | None] | None:
        found = needs(Config(), PLAN, BIG, grow, memory, offloads=True)
        result = fit(found, PLAN, memory, lambda: ("advice",))
        assert (result.advice == ("advice",)) == (result.choice is None)
        return (result.choice.states.layout.stage, result.micro_batch) if result.choice else None

    assert chosen(80 * GIB) == (0, 6)
    assert chosen(26 * GIB) == (0, 2)  # 16 GiB of states and 6 of 23.4
    stage, size = chosen(20 * GIB) or (0, 0)
    assert stage > 0 and size is not None and size >= 2
    assert chosen(4 * GIB) is None


def lines_of(memory: int, *, ranks: int = 8, **more: Any) -> list[str]:
    config = Config()
    config.train.global_batch = 6 * ranks
    plan = BatchPlan(6 * ranks, 2, 3, ranks)
    return list(advice(config, plan, BIG, lambda changed: grow, memory, **more))


def test_what_would_help_needs_less_than_the_best_stage_does_now() -> None:
    """One rank: stage 3 shards nothing and needs more than stage 0 does."""
    (away, more) = lines_of(5 * GIB, ranks=1)
    assert away.startswith("zero.offload_optimizer=true: ") or away.startswith("zero.offload_optimizer=true and ")
    assert "6 GPUs instead of 1: " in more
    one = BatchPlan(6, 1, 6, 1)
    now = min(needed(count_states(BIG, layout), grow(1)) for layout in layouts(Config(), one, offloads=False))
    six = {
        layout.stage: needed(count_states(BIG, layout), grow(1))
        for layout in layouts(Config(), BatchPlan(6, 1, 1, 6), offloads=False)
    }
    best = min(six, key=lambda stage: six[stage])
    assert more.split(": ")[1].startswith(f"{shown(six[best])} at stage {best} with a micro-batch of 1")
    assert six[best] < now
    assert "data.crop" not in str(lines_of(5 * GIB)), "what needs as much as now is no help"
    assert not any("offload" in line.split(":")[0] for line in lines_of(5 * GIB, offloads=True)), "it is tried already"


def test_divisors() -> None:
    assert [divisors(n) for n in (1, 7, 12, 36)] == [[1], [1, 7], [1, 2, 3, 4, 6, 12], [1, 2, 3, 4, 6, 9, 12, 18, 36]]


def test_the_update_counts_where_it_needs_more_than_the_activations() -> None:
    states = count_states(BIG, Layout(0, ranks=2))
    assert states.update == 500_000_000 * 4
    assert needed(states, grow(0)) == states.gpu.total + states.update
    assert needed(states, grow(1)) == states.gpu.total + 3 * GIB


def test_time_and_cores() -> None:
    config = Config()
    config.train.steps, config.train.global_batch, config.data.workers = 3600, 100, 3
    took = duration(config, 8, 36_000, Rate(50.0, "given"))
    assert (took.images, took.epochs, took.total, took.hours) == (360_000, 10.0, 400.0, 0.25)
    assert duration(config, 8, None, None).epochs is None and duration(config, 8, None, None).hours is None
    need = cores(config, 8, 2, took.total, Rate(30.0, "given"))
    assert (need.a_rank, need.workers, need.a_node, need.configured) == (2, 16, 12, 720.0)
    assert cores(config, 8, 2, None, Rate(30.0, "given")).workers is None


def test_what_a_checkpoint_takes() -> None:
    config = Config()
    config.checkpoint.keep_last, config.checkpoint.keep_best = 2, False
    found = count_checkpoints(TENSORS, config, Written(2, 700, 210, 1330))
    assert (found.weights, found.moments, found.average, found.total, found.kept) == (440, 800, 0, 1240, 3)
    assert (found.first_rank, found.other_ranks) == (700, 210)
    config.ema.decay, config.zero.stage = 0.9, 3
    assert count_checkpoints(TENSORS, config, Written(3, 500, 410, 1730)).average == 400
    config.checkpoint.asynchronous = False
    found = count_checkpoints(TENSORS, config, Written(3, 500, 410, 1730))
    assert (found.first_rank, found.other_ranks) == (0, 0)


@pytest.mark.parametrize(("text", "size"), [("141GiB", 141 * GIB), ("80GB", 80 * 10**9), ("24576 MiB", 24 * GIB)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, where="--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "80", "80G", "-1GB", "GiB", "1e3GB", "0GiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match="is no size of a memory"):
        parse_size(text, where="--gpu-memory")


def test_sizes_are_shown_in_what_can_be_read() -> None:
    assert (shown(3 * GIB // 2), shown(3 * 2**20)) == ("1.50 GiB", "3.0 MiB")


def test_the_tracker_counts_storages_for_as_long_as_they_live() -> None:
    before = torch.ones(1000)
    with Tracker([before], {"aten::mul": lambda args, out: 5_000}) as tracker:
        a = torch.zeros(1000)
        view = a.view(10, 100)
        before.add_(1)
        assert (tracker.live, tracker.peak) == (4000, 4000)
        b = a + 1
        del b
        assert (tracker.live, tracker.peak) == (4000, 8000)
        del a
        assert tracker.live == 4000, "a view holds its storage"
        view = view * 2
        assert (tracker.live, tracker.peak) == (4000, 8000 + 5000)


def test_on_a_gpu_attention_keeps_no_scores() -> None:
    def kept(fused: bool) -> int:
        with FakeTensorMode():
            q, k, v = (torch.empty(1, 2, 256, 16, requires_grad=True) for _ in range(3))
            bias = torch.empty(1, 2, 256, 256, requires_grad=True)
            with FusedAttention() if fused else nullcontext(), Tracker([q, k, v, bias], {}) as tracker:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
                assert out.shape == q.shape and out.requires_grad
                return tracker.live

    scores = 2 * 256 * 256 * 4
    assert kept(fused=False) >= scores > 8 * kept(fused=True)
