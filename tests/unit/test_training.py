"""Small parts of training: schedule, parameter groups, signals, rank facts, launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mf_scale.config.schema import OptimizerConfig, ScheduleConfig
from mf_scale.distributed.env import World, visible_gpus, world_from_environment
from mf_scale.errors import UserError
from mf_scale.training.optimizer import group_table, parameter_groups
from mf_scale.training.preemption import install_handlers
from mf_scale.training.schedule import lr_factor
from mf_scale.training.seeding import seed_model


def test_poly_schedule_with_warm_up() -> None:
    config = ScheduleConfig(warmup_updates=10, warmup_start=0.1)
    assert lr_factor(config, 0, 100) == pytest.approx(0.1)
    assert lr_factor(config, 5, 100) == pytest.approx(0.55 * 0.95**0.9)
    assert lr_factor(config, 50, 100) == pytest.approx(0.5**0.9)
    assert lr_factor(config, 100, 100) == 0.0
    assert lr_factor(ScheduleConfig(name="constant"), 77, 100) == 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.queries = nn.Embedding(2, 4)
        self.head = nn.Linear(4, 2)
        self.fixed = nn.Parameter(torch.zeros(1), requires_grad=False)


def test_parameter_groups_cover_each_trained_parameter_once() -> None:
    model = Net()
    groups = {
        g["name"]: g
        for g in parameter_groups(model, OptimizerConfig(lr=1.0, backbone_multiplier=0.1, weight_decay=0.5))
    }
    sizes = {name: sum(p.numel() for p in g["params"]) for name, g in groups.items()}
    assert sizes == {"backbone": 112, "backbone/no_decay": 8, "rest": 10, "rest/no_decay": 8}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "backbone": (0.1, 0.5),
        "backbone/no_decay": (0.1, 0.0),
        "rest": (1.0, 0.5),
        "rest/no_decay": (1.0, 0.0),
    }
    assert "backbone/no_decay" in group_table(list(groups.values()))


def test_model_randomness_is_a_function_of_seed_step_and_lane() -> None:
    def draw(*place: int) -> float:
        seed_model(place[0], place[1], lane=place[2])
        return float(torch.rand(1))

    assert draw(0, 5, 3) == draw(0, 5, 3)
    assert len({draw(0, 5, 3), draw(1, 5, 3), draw(0, 6, 3), draw(0, 5, 4)}) == 4


def test_signals_only_set_the_flag_however_often_they_come() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        flag = install_handlers()
        assert not flag.wanted
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert flag.wanted
        assert flag.reason == "SIGUSR1"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_rank_facts() -> None:
    assert world_from_environment({}) == World(0, 1, 0)
    assert world_from_environment({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == World(1, 4, 0)
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    assert world_from_environment(slurm) == World(3, 4, 1)
    # The batch shell of a job is no rank.
    assert world_from_environment({k: v for k, v in slurm.items() if k != "SLURM_STEP_ID"}) == World()
    with pytest.raises(UserError, match="WORLD_SIZE"):
        world_from_environment({"RANK": "1", "LOCAL_RANK": "0"})
    with pytest.raises(UserError, match="does not lie below"):
        world_from_environment({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


LAUNCH = """
import sys, mf_scale.distributed.launch as launcher
launcher._GRACE = 2.0
def start(arguments, rank, size, rendezvous, held):
    import os, subprocess
    return subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "RANK": str(rank)},
                            preexec_fn=launcher._end_with_parent)
launcher._start = start
from mf_scale.training.preemption import install_handlers
sys.exit(launcher.launch([], 2, install_handlers().signals))
"""


def launch(rank_code: str, tmp_path: Path, kill: int | None = None) -> tuple[int, str]:
    code = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + rank_code
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        if kill is not None:
            deadline = time.monotonic() + 30
            while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(kill)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output


WAIT_FOR_TERM = """
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
open(f'ready-{rank}', 'w').close()
while not stop: time.sleep(0.02)
"""


@pytest.mark.parametrize(
    ("rank_code", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(85)", 85),
        ("sys.exit(2 if rank else 0)", 2),
        ("sys.exit(85 if rank else 3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)", 137),
    ],
)
def test_launcher_passes_the_exit_code_on_and_leaves_nobody_behind(
    tmp_path: Path, rank_code: str, expected: int
) -> None:
    began = time.monotonic()
    assert launch(rank_code, tmp_path)[0] == expected
    assert time.monotonic() - began < 30


def test_launcher_passes_a_stop_on(tmp_path: Path) -> None:
    assert launch(WAIT_FOR_TERM + "sys.exit(85)", tmp_path, kill=signal.SIGTERM)[0] == 85


def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    """Even kill -9 of the launcher reaches the ranks, as a stop they can save at."""
    launch(WAIT_FOR_TERM + "open(f'ended-{rank}', 'w').close()", tmp_path, kill=signal.SIGKILL)
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("ended-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.glob("ended-*"))) == 2
