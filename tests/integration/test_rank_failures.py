"""Exceptions of any rank reach the log: with the rank and its host, each once, whatever started the ranks."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mf_scale.tracking.metrics import read_metrics
from tests.integration.program import Run
from tests.integration.slurm_step import Step

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]
SCRIPT = Path(__file__).with_name("failing_rank.py")
ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
LAUNCH = """
import sys
from mf_scale.distributed import launch
launch.RANK_MODULE = "tests.integration.failing_rank"
sys.exit(launch.launch(sys.argv[1:], 2, []))
"""
ELASTIC = """
import os, sys
from mf_scale.config.signals import DEFAULT
from mf_scale.distributed import elastic
elastic.RANK_MODULE = "tests.integration.failing_rank"
os._exit(elastic.run_ranks(sys.argv[1:], 2, elastic.alone(), [], DEFAULT))
"""


def by_launcher(code: str, folder: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100, check=False,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout


def own(folder: Path, *words: str) -> tuple[int, str]:
    """As `mf-scale train --processes 2` starts its ranks."""
    return by_launcher(LAUNCH, folder, *words)


def elastic(folder: Path, *words: str) -> tuple[int, str]:
    """As launch/local.sh starts them."""
    return by_launcher(ELASTIC, folder, *words)


def slurm(folder: Path, *words: str) -> tuple[int, str]:
    """As srun starts them; one log."""
    step = Step(2)
    for rank in (0, 1):
        step.start(rank, [str(SCRIPT), str(folder), *words])
    ended = step.end()
    return max(code for code, _, _ in ended.values()), "".join(err for _, _, err in ended.values())


def heads(log: str) -> list[str]:
    """The ranks that name themselves in front of the lines, once for each run of them."""
    found = re.findall(rf"^(rank \d) on {re.escape(HOST)}: ", log, re.MULTILINE)
    return [rank for place, rank in enumerate(found) if place == 0 or found[place - 1] != rank]


@pytest.mark.parametrize("start", [own, elastic, slurm])
def test_ranks_that_fail_alike_leave_one_traceback(tmp_path: Path, start: Callable[..., tuple[int, str]]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    code, log = start(tmp_path, "late", "01")
    assert code == 1 and log.count("Traceback") == 1, log
    (other,) = re.findall(r"told to fail late as (\d),.* \(the traceback is that of", log)
    first = "10"[int(other)]
    assert f"rank {first} on {HOST}: Traceback" in log and f"rank {first} on {HOST}: ValueError: told" in log
    assert sorted(heads(log)) == ["rank 0", "rank 1"], "lines of two ranks are not mixed"
    assert f"rank {other} on {HOST}: ValueError: told to fail late as {other}" in log
    assert f"(the traceback is that of rank {first} on {HOST})" in log
    assert all(line.startswith("rank ") for line in log.splitlines() if "File " in line or "Error" in line)
    assert "pass@" not in log and len(list((tmp_path / "errors").glob("*.json"))) == 1


@pytest.mark.parametrize("start", [own, slurm])
def test_one_rank_that_fails_is_named_and_its_peer_says_what_it_saw(
    tmp_path: Path, start: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    code, log = start(tmp_path, "late", "1")
    assert code == 1 and f"rank 1 on {HOST}: ValueError: told to fail late as 1" in log, log
    assert re.search(rf"^rank 0 on {re.escape(HOST)}: (RuntimeError|\S*Dist\S*Error): ", log, re.MULTILINE), log


def test_what_fails_before_the_ranks_have_met_is_said_once_too(tmp_path: Path) -> None:
    code, log = own(tmp_path, "early", "01")
    assert code == 1 and log.count("Traceback") == 1, log
    assert sorted(heads(log)) == ["rank 0", "rank 1"]
    assert list(tmp_path.iterdir()) == [], "a folder that is no run directory stays as it was"


def test_a_run_tells_which_rank_ended_it(tmp_path: Path, packed: Path) -> None:
    """Rank 0 only sees that its connection breaks; what rank 1 left says why."""
    run = Run(tmp_path / "run", packed)
    failed = run.train("train.steps=4", "tracking.wandb=disabled", MF_SCALE_FAULT="full train.step rank=1 step=2")
    assert failed.returncode == 1
    assert f"rank 1 on {HOST}: OSError: [Errno 28]" in failed.stderr
    (stop,) = [record for record in read_metrics(run.folder / "metrics.jsonl") if record["event"] == "stop"]
    assert stop["reason"].startswith(f"rank 1 on {HOST}: OSError: [Errno 28]") and stop["exit_code"] == 1


@pytest.mark.parametrize("start", [own, elastic])
def test_a_rank_that_is_killed_is_named_by_who_started_it(
    tmp_path: Path, start: Callable[..., tuple[int, str]]
) -> None:
    """srun says so itself: "task 1: Killed"."""
    code, log = start(tmp_path, "killed", "1")
    assert code == 128 + signal.SIGKILL
    assert re.search(rf"^(mf-scale|launch/local.sh): rank 1 on {re.escape(HOST)} was killed by SIGKILL$", log, re.M), (
        log
    )
