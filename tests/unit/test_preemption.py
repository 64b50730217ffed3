"""Stop requests: which signals count, how often, and the deadline of a SLURM job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from mf_scale.config.load import load_config
from mf_scale.config.schema import Config
from mf_scale.config.signals import DEFAULT, STOPPING
from mf_scale.config.validate import validate
from mf_scale.data.workers import _start_worker
from mf_scale.errors import UserError
from mf_scale.training.preemption import StopFlag, configure, install_handlers


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What the process had before stands again after each test."""
    numbers = [signal.Signals[name] for name in STOPPING]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def config(*overrides: str) -> Config:
    return load_config(None, overrides)


def send(*names: str) -> None:
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])


def test_the_default_of_the_schema_is_what_is_caught_first() -> None:
    assert tuple(Config().train.stop_signals) == DEFAULT
    assert set(DEFAULT) <= set(STOPPING)


def test_a_second_and_a_third_signal_only_append() -> None:
    flag = install_handlers()
    assert configure(flag, config(), {}) == []
    assert not flag.wanted
    assert flag.reason == ""
    send("SIGUSR1", "SIGTERM", "SIGTERM", "SIGINT")
    assert flag.wanted
    assert flag.signals == ["SIGUSR1", "SIGTERM", "SIGTERM", "SIGINT"]
    assert flag.reason == "SIGUSR1"


def test_configured_signals_are_caught_and_the_others_get_their_default_back() -> None:
    flag = install_handlers()
    configure(flag, config("train.stop_signals=[SIGUSR2,SIGTERM]"), {})
    send("SIGUSR2", "SIGTERM")
    assert flag.signals == ["SIGUSR2", "SIGTERM"]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_not_wanted_does_its_default_also_when_it_came_early() -> None:
    flag = install_handlers()
    send("SIGINT", "SIGTERM")
    with pytest.raises(KeyboardInterrupt):
        configure(flag, config("train.stop_signals=[SIGTERM]"), {})
    assert flag.signals == ["SIGTERM"]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGSEGV", "TERM", "sigterm"])
def test_a_name_that_cannot_ask_for_a_stop_is_refused_with_those_that_can(name: str) -> None:
    with pytest.raises(UserError, match=rf"'{name}' cannot ask a run to stop; what can: SIGTERM, SIGUSR1, .*SIGXCPU"):
        validate(config(f"train.stop_signals=[SIGTERM,{name}]"))


def test_every_name_that_is_offered_can_be_caught() -> None:
    flag = install_handlers()
    everything = config(f"train.stop_signals=[{','.join(STOPPING)}]")
    validate(everything)
    configure(flag, everything, {})
    send(*STOPPING)
    assert flag.signals == list(STOPPING)


def test_the_deadline_asks_for_a_stop_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    flag, end = StopFlag(), int(time.time()) + 3600
    times = {"SLURM_JOB_END_TIME": str(end), "SLURM_JOB_START_TIME": str(end - 7200)}
    assert configure(flag, config("train.stop_before=2"), times) == []
    assert not flag.wanted
    monkeypatch.setattr(time, "time", lambda: end - 121.0)
    assert not flag.wanted
    monkeypatch.setattr(time, "time", lambda: end - 119.0)
    assert flag.wanted
    assert flag.reason.startswith("deadline: train.stop_before")


@pytest.mark.parametrize(
    ("environment", "minutes", "note"),
    [
        ({}, 2, None),
        ({"SLURM_JOB_END_TIME": "9999999999"}, 0, None),
        ({"SLURM_JOB_END_TIME": "tomorrow"}, 2, "'tomorrow' is no number of seconds: the run has no deadline"),
        ({"SLURM_JOB_END_TIME": "9999999999", "SLURM_JOB_START_TIME": "x"}, 2, "the run has no deadline"),
        ({"SLURM_JOB_END_TIME": "1000"}, 2, "= 1000 is not to come: the run has no deadline"),
        ({"SLURM_JOB_END_TIME": "nan"}, 2, "= nan is not to come"),
        ({"SLURM_JOB_END_TIME": "inf"}, 2, "= inf is not to come"),
    ],
)
def test_without_an_end_or_with_rubbish_there_is_no_deadline(environment, minutes, note) -> None:
    flag = StopFlag()
    notes = configure(flag, config(f"train.stop_before={minutes}"), environment)
    assert flag.deadline == float("inf")
    assert not flag.wanted
    assert notes == [] if note is None else (len(notes) == 1 and note in notes[0])


def test_a_deadline_before_the_start_of_the_job_is_a_mistake() -> None:
    """Else every start of the job would stop at once, be requeued, and never take a step."""
    end = int(time.time()) + 600
    times = {"SLURM_JOB_END_TIME": str(end), "SLURM_JOB_START_TIME": str(end - 1200)}
    with pytest.raises(UserError, match=r"stop_before = 20 minutes is as long as the whole job of 20 minutes"):
        configure(StopFlag(), config("train.stop_before=20"), times)


def test_looking_at_the_flag_is_cheap() -> None:
    flag = StopFlag(deadline=time.time() + 3600)
    began = time.perf_counter()
    for _ in range(10_000):
        assert not flag.wanted
    assert time.perf_counter() - began < 0.5  # 50 microseconds each would already be a fault


class _Pid:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, _: int) -> int:
        time.sleep(0.05)
        return os.getpid()


def test_workers_outlive_every_signal_that_can_be_configured() -> None:
    """A worker that died of one would take the last save with it."""
    pids: Any = _Pid()
    loader: DataLoader[int] = DataLoader(pids, batch_size=None, num_workers=1, worker_init_fn=_start_worker)
    items = iter(loader)
    worker = next(items)
    assert worker != os.getpid()
    for name in STOPPING:
        os.kill(worker, signal.Signals[name])
    assert list(items) == [worker] * 7


LAUNCHER = """
import sys, mf_scale.distributed.launch as launcher
from mf_scale.config.load import load_config
from mf_scale.training.preemption import configure, install_handlers
from pathlib import Path
launcher.sys = type("sys", (), {"executable": sys.argv[1]})
flag = install_handlers()
configure(flag, load_config(None, ["train.stop_signals=[SIGUSR2,SIGHUP]"]), {})
Path("up").touch()
sys.exit(launcher.launch([], 2, flag.signals, ["SIGUSR2", "SIGHUP"]))
"""
RANK = """#!{python}
import os, sys, time
from pathlib import Path
rank = os.environ["RANK"]
Path("early-" + rank).touch()
time.sleep(0.5)  # imports: a signal's default would kill
from mf_scale.config.load import load_config
from mf_scale.training.preemption import configure, install_handlers
flag = install_handlers()
configure(flag, load_config(None, ["train.stop_signals=[SIGUSR2,SIGHUP]"]), {{}})
Path("ready-" + rank).touch()
while len(flag.signals) < int(os.environ["WANTED"]): time.sleep(0.01)
Path("heard-" + rank).write_text(" ".join(flag.signals))
sys.exit(85)
"""


@pytest.mark.parametrize("moment", ["early", "ready"])
def test_the_launcher_passes_configured_signals_on_whenever_they_come(tmp_path, moment) -> None:
    rank = tmp_path / "rank"
    rank.write_text(RANK.format(python=sys.executable))
    rank.chmod(0o755)
    environment = {**os.environ, "WANTED": "1", "PYTHONPATH": str(Path.cwd())}
    child = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(rank)], cwd=tmp_path, env=environment)
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob(f"{moment}-*"))) < 2:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGUSR2)
        assert child.wait(timeout=60) == 85
    finally:
        child.kill()
        child.wait()
    assert {file.read_text() for file in tmp_path.glob("heard-*")} == {"SIGUSR2"}
    assert len(list(tmp_path.glob("heard-*"))) == 2
