"""The loop's helpers: garbage collection, transfer, seeding, time since the start, and the cut of a batch."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from mf_scale.config.load import load_config
from mf_scale.config.validate import plan_batch, plan_note, validate
from mf_scale.errors import UserError
from mf_scale.training.garbage import held_off_the_step
from mf_scale.training.seeding import seed_model
from mf_scale.training.startup import seconds_since_start
from mf_scale.training.transfer import Transfer
from tests.random_batches import random_batch


class Knot:
    """Garbage that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def knot() -> weakref.ref[Knot]:
    return weakref.ref(Knot())


def test_python_collects_at_the_wanted_steps_only() -> None:
    assert gc.isenabled()
    with held_off_the_step(4) as collector:
        assert not gc.isenabled()
        left, freed_at = knot(), []
        for step in range(1, 13):
            _ = [[] for _ in range(5_000)]  # enough to set Python's own collection off
            collector.collect_if_due(step)
            if left() is None:
                freed_at.append(step)
                left = knot()
        assert gc.get_freeze_count() > 1000
    assert freed_at == [4, 8, 12]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_zero_leaves_the_collector_to_python() -> None:
    with held_off_the_step(0) as collector:
        assert gc.isenabled()
        left = knot()
        collector.collect_if_due(0)
        assert left() is not None
    gc.collect()


def test_the_collector_is_enabled_again_after_an_error_and_stays_off_where_it_was() -> None:
    with pytest.raises(ValueError, match="x"), held_off_the_step(3):
        raise ValueError("x")
    assert gc.isenabled()
    gc.disable()
    try:
        with held_off_the_step(3):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_on_a_cpu_micro_batches_are_views_in_order(size: int) -> None:
    batch = random_batch([1, 2, 0, 3, 4])
    transfer = Transfer(torch.device("cpu"))
    transfer.start(batch, size)
    parts = list(transfer.micro_batches(batch, size))
    assert [key for part in parts for key in part.keys] == batch.keys
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert parts[0].images.data_ptr() == batch.images.data_ptr()


def test_a_copy_that_was_begun_for_another_batch_is_dropped() -> None:
    transfer = Transfer(torch.device("cpu"))
    one, other = random_batch([1, 2], seed=1), random_batch([2, 1], seed=2)
    transfer.start(one, 1)
    assert torch.equal(next(transfer.micro_batches(other, 1)).images, other.images[:1])
    transfer.start(one, 1)
    assert len(next(transfer.micro_batches(one, 2))) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("early", [True, False])
def test_copies_on_cuda_are_whole_and_survive_the_reuse_of_memory(early: bool) -> None:
    device = torch.device("cuda", 0)
    transfer, sums = Transfer(device), []
    batches = [random_batch([3, 2, 4, 1], (256, 256), seed=seed) for seed in range(20)]
    for batch in batches:
        if early:
            transfer.start(batch, 2)
        for micro in transfer.micro_batches(batch, 2):
            assert micro.images.device == device
            busy = torch.randn(2048, 2048, device=device)
            for _ in range(4):  # the copy of the next one overtakes this
                busy = busy @ busy / 2048
            sums.append(torch.stack([micro.images.long().sum(), micro.segment_map.long().sum(), micro.labels.sum()]))
            del micro
    wanted = [
        [int(t[i : i + 2].long().sum()) for t in (b.images, b.segment_map, b.labels)] for b in batches for i in (0, 2)
    ]
    assert torch.stack(sums).tolist() == wanted


def draws() -> tuple[float, float, float]:
    return float(torch.rand(1)), random.random(), float(np.random.rand())


def test_nothing_that_happens_between_steps_changes_what_a_model_draws() -> None:
    seed_model(3, 7, lane=1)
    first = draws()
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    draws()
    seed_model(3, 7, lane=1)
    assert draws() == first
    for place in ((4, 7, 1), (3, 8, 1), (3, 7, 2)):
        seed_model(place[0], place[1], lane=place[2])
        assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_dropout_is_a_function_of_the_place() -> None:
    def masks(place: int) -> Tensor:
        seed_model(0, place, lane=0)
        return torch.nn.functional.dropout(torch.ones(100), 0.5)

    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))


def test_the_time_since_the_start_counts_the_interpreter_and_what_came_before_the_import() -> None:
    code = "import time; time.sleep(1); from mf_scale.training.startup import seconds_since_start as s; print(s())"
    began = time.monotonic()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert 0.99 <= float(told) <= time.monotonic() - began + 0.02
    before = seconds_since_start()
    time.sleep(0.05)
    assert 0.04 < seconds_since_start() - before < 10


def test_without_proc_it_counts_from_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    assert 0 <= seconds_since_start() < 3600


def test_a_start_does_not_import_what_only_a_compiler_needs() -> None:
    """Triton's and inductor's machinery costs a second; a run that does not compile has no use for it."""
    heavy = ("torch._inductor.compile_fx", "timm", "wandb", "matplotlib", "deepspeed")
    code = f"import sys, mf_scale.training.trainer\nprint([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("total", "micro", "ranks", "cut"),
    [
        (12, 4, 1, (4, 3)),
        (12, 4, 2, (3, 2)),
        (12, 4, 4, (3, 1)),
        (12, 4, 12, (1, 1)),
        (14, 6, 2, (1, 7)),
        (6, 99, 2, (3, 1)),
    ],
)
def test_the_micro_batch_adapts_to_what_a_rank_has(total: int, micro: int, ranks: int, cut: tuple[int, int]) -> None:
    config = load_config(None, [f"train.global_batch={total}", f"train.micro_batch={micro}"])
    plan = plan_batch(config, ranks)
    assert (plan.micro_batch, plan.accumulation) == cut
    assert plan.micro_batch * plan.accumulation * ranks == total
    note = plan_note(config, plan)
    if plan.micro_batch == micro:
        assert note is None
    else:
        assert note == (
            f"train.micro_batch = {micro} does not divide the {total // ranks} samples of a rank: "
            f"{plan.micro_batch} are taken"
        )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["zero.stage=0", "zero.offload_optimizer=true"], "offload_optimizer does nothing with zero.stage = 0"),
        (["zero.stage=2", "zero.offload_parameters=true"], "offload_parameters does nothing with zero.stage = 2"),
        (["ema.decay=1"], "ema.decay = 1.0 would keep the first weights for ever"),
        (["ema.decay=1.5"], "ema.decay = 1.5 must lie in 0..1"),
        (["ema.decay=-0.1"], "ema.decay = -0.1 must lie in 0..1"),
        (["eval.weights=ema"], "eval.weights = ema asks for a moving average that ema.decay = 0 does not keep"),
        (["guard.spike_window=5"], "guard.spike_window = 5 does nothing with guard.spike_factor = 0"),
        (["guard.spike_skip=5"], "guard.spike_skip = 5 does nothing with guard.spike_factor = 0"),
        (["guard.spike_rollbacks=5"], "guard.spike_rollbacks = 5 does nothing with guard.spike_factor = 0"),
        (["guard.window=5", "guard.skipped_share=0"], "guard.window = 5 does nothing with guard.skipped_share = 0"),
        (["guard.window=5", "guard.skipped_share=1"], "guard.window = 5 does nothing with guard.skipped_share = 1"),
        (["guard.spike_factor=0.9"], "guard.spike_factor = 0.9 would take every ordinary loss for a spike"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        validate(load_config(None, overrides))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["zero.stage=1", "zero.offload_optimizer=true"],
        ["zero.stage=3", "zero.offload_optimizer=true", "zero.offload_parameters=true"],
        ["ema.decay=0.999", "eval.weights=ema"],
        ["guard.spike_factor=3", "train.stop_signals=[]", "train.gc_every=0"],
        ["guard.spike_factor=3", "guard.spike_window=5", "guard.spike_skip=5", "guard.spike_rollbacks=5"],
        ["guard.skipped_share=0", "guard.window=500", "guard.spike_window=100", "guard.spike_skip=10"],
        ["guard.skipped_share=0.3", "guard.window=50"],
        ["train.precision=fp16", "zero.stage=0"],
    ],
)
def test_what_makes_sense_is_not(overrides: list[str]) -> None:
    validate(load_config(None, overrides))
