"""Own seconds of ranks: what counts as a rank's own, and which rank is named."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from mf_scale.config.schema import TrainConfig
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.training import phases as room
from mf_scale.training.phases import OWN, PHASES, Phases, StepTimes
from mf_scale.training.straggler import RANKS_TOLD, RankTimes, Straggler, Stragglers, slowest, straggler_sentence

EVEN = [0.01, 0.2, 0.1, 0.01]
"""Own seconds by OWN."""
STEP = 0.8


def table(ranks: int, **slow: float) -> np.ndarray:
    """Own seconds of `ranks` even ranks, the second of which is slower in the named phases."""
    own = np.array([EVEN] * ranks)
    for phase, seconds in slow.items():
        own[1, OWN.index(phase)] += seconds
    return own


def times_of(own: np.ndarray, step: float = STEP) -> RankTimes:
    phases = np.full((len(own), len(PHASES)), step / len(PHASES))
    return RankTimes(phases, own, np.full(len(own), step))


def test_the_line_lists_all_of_few_ranks_and_the_slowest_of_many() -> None:
    told = times_of(table(3, data=0.5)).told()
    assert [rank["rank"] for rank in told["slowest"]] == [1, 0, 2]
    assert told["slowest"][0]["own"] == pytest.approx(sum(EVEN) + 0.5)
    assert set(PHASES) < set(told["slowest"][0]) and list(told["phases"]) == list(PHASES)
    times = times_of(table(99))
    times.phases[:, 0] = np.arange(99)
    assert times.told()["phases"]["data"] == [0, 49, 98]
    assert [rank["rank"] for rank in times.told()["slowest"]] == list(range(RANKS_TOLD))


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("phase", OWN)
def test_a_slow_rank_is_named_with_the_phase_it_loses_most_in(ranks: int, phase: str) -> None:
    found = slowest(times_of(table(ranks, **{phase: 0.3}), STEP), 1.3)
    even = EVEN[OWN.index(phase)]
    assert found is not None
    assert (found.rank, found.phase) == (1, phase)
    assert (found.seconds, found.median) == pytest.approx((even + 0.3, even))
    assert (found.own, found.own_median, found.cost) == pytest.approx((sum(EVEN) + 0.3, sum(EVEN), 0.3))


def test_a_gpu_that_is_slower_in_everything_is_named_though_no_phase_alone_would_be_enough() -> None:
    found = slowest(times_of(table(4, forward=0.08, loss=0.04), STEP), 1.3)
    assert found is not None and found.phase == "forward"


def test_what_does_not_matter_is_not_said() -> None:
    assert slowest(times_of(table(4), STEP), 1.3) is None
    assert slowest(times_of(table(4, forward=0.05), STEP), 1.3) is None  # 1.16 times the others'
    tiny = table(4, data=0.3) / 10  # 1.9 times, and 0.03 s of a step that is spent in collectives
    assert slowest(times_of(tiny, STEP), 1.3) is None
    assert slowest(times_of(tiny, STEP / 2), 1.3) is not None


def test_two_that_are_slow_do_not_hide_each_other_among_many() -> None:
    own = table(8, forward=0.3)
    own[5] = own[1] - 0.01
    found = slowest(times_of(own, STEP), 1.3)
    assert found is not None and found.rank == 1


def test_means_are_compared_so_that_one_hiccup_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(forward: float) -> StepTimes:
        own = dict(zip(OWN, EVEN, strict=True)) | {"forward": forward}
        return StepTimes(STEP, dict.fromkeys(PHASES, STEP / len(PHASES)), own)

    def other_rank(mine: np.ndarray) -> np.ndarray:
        return mine + np.array([[*[STEP / len(PHASES)] * len(PHASES), *EVEN, STEP], [0.0] * (len(PHASES) + 5)])

    monkeypatch.setattr(comm, "sum_array", other_rank)
    stragglers = Stragglers(TrainConfig(straggler_every=10, straggler_factor=1.3), World(1, 2, 1))
    assert stragglers.add(times(60.0)) is None  # the first step compiles
    told = [stragglers.add(times(0.7 if step == 3 else 0.2)) for step in range(10)]
    assert told[:-1] == [None] * 9 and told[-1] is not None
    assert slowest(told[-1], 1.3) is None  # half a second in ten steps
    told = [stragglers.add(times(9.0), counts=False) for _ in range(5)]  # a profiled step
    told += [stragglers.add(times(0.4)) for _ in range(10)]
    assert told[:-1] == [None] * 14
    found = slowest(told[-1], 1.3) if told[-1] is not None else None
    assert found is not None and (found.rank, found.phase) == (1, "forward")
    assert found.seconds == pytest.approx(0.4)
    alone = Stragglers(TrainConfig(straggler_every=1), World())
    off = Stragglers(TrainConfig(straggler_every=0), World(1, 2, 1))
    assert [one.add(times(9.0)) for one in (alone, off) for _ in range(3)] == [None] * 6


def test_the_sentence() -> None:
    found = Straggler(3, "data", 0.4, 0.01, own=0.7, own_median=0.35, cost=0.35)
    assert straggler_sentence(found, "node7", 101, 200) == (
        "steps 101 to 200: the others wait 0.350 s a step for rank 3 on node7, which needs 2.0x their time; most in "
        "data: 0.400 s, the median of the others is 0.010"
    )


def take_step(phases: Phases, waited: float) -> Any:
    phases.batch_there(waited)
    for phase in ("forward", "loss", "backward", "other", "forward", "loss", "backward", "optimizer"):
        phases.enter(phase)
        time.sleep(0.01)
    return phases.end().read()


def test_on_a_cpu_phases_are_the_hosts_and_waiting_for_others_is_not_own(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = Phases(torch.device("cpu"), gathers=False)
    time.sleep(0.03)  # own: the last step's books
    monkeypatch.setitem(comm._waits, "seconds", comm.seconds_waited() + 0.02)  # of which this is waiting
    time.sleep(0.05)  # for the batch
    times = take_step(phases, waited=0.05)
    assert list(times.phases) == list(PHASES)
    assert times.phases["data"] == times.own["data"] == 0.05
    for phase in ("forward", "loss", "backward"):
        assert 0.02 <= times.phases[phase] < 0.035, phase
    assert 0.01 <= times.phases["optimizer"] < 0.02
    assert 0.04 <= times.phases["other"] < 0.06  # all else
    assert 0.009 <= times.own["other"] < 0.025
    assert set(times.own) == set(OWN)
    assert times.seconds == pytest.approx(sum(times.phases.values()), rel=0.01)


def test_a_pause_is_no_part_of_the_next_step() -> None:
    phases = Phases(torch.device("cpu"), gathers=False)
    time.sleep(0.1)
    phases.restart()
    times = take_step(phases, waited=0.0)
    assert times.phases["other"] < 0.03
    assert times.own["other"] < 0.01


def test_where_the_forward_pass_gathers_it_is_not_own() -> None:
    times = take_step(Phases(torch.device("cpu"), gathers=True), waited=0.0)
    assert times.own["forward"] == 0 and times.phases["forward"] > 0 and times.own["loss"] > 0


class Event:
    """torch.cuda.Event on a device whose clock the test sets; asking it before it came is an error, as on a GPU."""

    clock = 0.0
    done = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.clock

    def elapsed_time(self, later: Event) -> float:
        assert later.at <= Event.done, "the device has not come so far"
        return 1000 * (later.at - self.at)


@pytest.mark.parametrize(("idle", "data", "other"), [(0.0, 0.0, 0.0), (0.03, 0.03, 0.0), (0.08, 0.05, 0.03)])
def test_on_a_gpu_the_phases_are_the_devices_read_late(
    monkeypatch: pytest.MonkeyPatch, idle: float, data: float, other: float
) -> None:
    """A wait for the batch that the device does not notice, being behind, costs nothing."""
    monkeypatch.setattr(room.torch.cuda, "Event", Event)
    Event.clock = Event.done = 0.0
    phases = Phases(torch.device("cuda"), gathers=False)
    phases.batch_there(0.05)  # host seconds
    Event.clock += idle
    for phase, seconds in (("forward", 0.2), ("loss", 0.1), ("backward", 0.4), ("optimizer", 0.05)):
        phases.enter(phase)
        Event.clock += seconds
    marks, Event.done = phases.end(), Event.clock  # as the values that are read late wait for the device
    Event.clock += 7
    phases.enter("forward")
    times = marks.read()
    wanted = {"data": data, "forward": 0.2, "loss": 0.1, "backward": 0.4, "optimizer": 0.05, "other": other}
    assert times.phases == pytest.approx(wanted)
    assert times.own == pytest.approx({"data": data, "forward": 0.2, "loss": 0.1, "other": 0.0}, abs=1e-3)
