"""launch/local.sh: torch's elastic launcher under our signals and exit codes, on one machine and on two."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.program import Run

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@contextmanager
def local(run: Run, *overrides: str, processes: int = 2, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """launch/local.sh on a small run, as its own process group; none of it is left behind."""
    arguments = run.command(*overrides, processes=processes)[4:]
    child = subprocess.Popen(
        ["bash", str(ROOT / "launch/local.sh"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "MF_PYTHON": sys.executable, **environment},
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def said(child: subprocess.Popen[str]) -> str:
    return child.communicate(timeout=150)[0]


def wait_for_step(run: Run, step: int, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while run.last_step() < step:
        assert child.poll() is None, said(child)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def first_rank(run: Run) -> int:
    return int((run.folder / ".lock").read_text().split()[0])


def ranks_of(launcher: int) -> list[int]:
    """Its children that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == launcher and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_signals_and_exit_codes_of_two_ranks(tmp_path):
    """Each line: what the ranks do, the common exit code, the signals that each got from the launcher."""
    term, usr1 = "SIGTERM", "SIGUSR1"
    cases: list[tuple[list[str], int, list[str]]] = [
        (["0", "0"], 0, ["", ""]),
        (["2", "sleep=1 1"], 2, ["", term]),
        (["die", "asked 1"], 128 + 9, ["?", term]),
        (["85", "sleep=1.5 85"], 85, ["", ""]),  # the slower one goes on saving in peace
        (["ask asked 85", "asked 85"], 85, [usr1, usr1]),
        (["85", "sleep=0.5 1"], 1, ["", ""]),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.elastic_start", str(tmp_path), json.dumps([c[0] for c in cases])],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [code for _, code, _ in cases]
    files = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert [[files.get(f"{n}-{rank}", "?") for rank in (0, 1)] for n in range(len(cases))] == [c[2] for c in cases]
    assert done.stderr == f"launch/local.sh: rank 0 on {socket.gethostname()} was killed by SIGKILL\n"


def test_it_starts_again_whatever_ended_the_ranks_until_it_is_asked_itself(tmp_path, packed):
    run = Run(tmp_path / "run", packed)
    with local(run, "train.steps=400") as child:
        wait_for_step(run, 2, child)
        os.kill(first_rank(run), signal.SIGTERM)
        wait_for_step(run, 9, child)
        os.kill(first_rank(run), signal.SIGKILL)
        before = run.last_step()
        wait_for_step(run, before + 5, child)
        os.kill(child.pid, signal.SIGINT)  # Ctrl-C reaches the launcher alone: the ranks have sessions of their own
        output = said(child)
    assert child.returncode == 85, output
    assert output.count("starting again") == 2
    assert "the ranks ended with exit code 85: starting again from the commit of step" in output
    assert "the ranks ended with exit code 137: starting again from the commit of step" in output
    last = [r for r in run.records() if r["event"] == "stop"][-1]["step"]
    assert run.state(last)["step"] == last
    assert list(run.series("step", "loss")) == list(range(1, last + 1))


@pytest.mark.soak
def test_starts_that_come_no_further_are_given_up(tmp_path, packed):
    """The rank dies in the first step of every start; the same command without the fault comes to the end."""
    run = Run(tmp_path / "run", packed)
    settings = ("train.steps=4", "launch.fruitless_starts=2")
    with local(run, *settings, processes=1, MF_SCALE_FAULT="kill train.forward step=1") as child:
        output = said(child)
    assert child.returncode == 128 + 9, output
    assert output.count("starting again") == 1, output
    assert "2 starts in a row brought the run no further than step 0: giving up" in output
    with local(run, *settings, processes=1) as child:
        output = said(child)
    assert child.returncode == 0 and "starting again" not in output, output
    assert run.state(4)["step"] == 4


def test_a_mistake_ends_it_at_once(tmp_path, packed):
    """One that the launcher sees, and one that only the ranks see."""
    run = Run(tmp_path / "run", packed)
    for override, wanted in (("train.stepps=3", "Did you mean train.steps"), ("data.train=/nowhere", "/nowhere")):
        with local(run, override) as child:
            output = said(child)
        assert child.returncode == 2 and wanted in output and "starting again" not in output, output
        assert "Traceback" not in output and output.count(wanted) == 1


def test_a_launcher_that_is_killed_outright_takes_its_ranks_along(tmp_path, packed):
    run = Run(tmp_path / "run", packed)
    with local(run, "train.steps=400") as child:
        wait_for_step(run, 2, child)
        ranks = ranks_of(child.pid)
        assert len(ranks) == 2
        os.kill(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{rank}").exists() for rank in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    last = [r for r in run.records() if r["event"] == "stop"][-1]["step"]
    assert run.state(last)["step"] == last


def test_two_machines_come_back_together_and_stop_together(tmp_path, packed):
    """Two launchers of one rank each: a killed rank of the second starts both again, TERM to the second ends both."""
    run = Run(tmp_path / "run", packed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    together = {"MF_NNODES": "2", "MF_RDZV_ENDPOINT": endpoint}
    settings = ("train.steps=400", "train.global_batch=4")
    with (
        local(run, *settings, processes=1, **together) as first,
        local(run, *settings, processes=1, **together) as second,
    ):
        wait_for_step(run, 5, first)
        victims = {child.pid: ranks_of(child.pid) for child in (first, second)}
        assert [len(ranks) for ranks in victims.values()] == [1, 1]
        os.kill(next(ranks[0] for ranks in victims.values() if ranks[0] != first_rank(run)), signal.SIGKILL)
        before = run.last_step()
        wait_for_step(run, before + 8, first)
        os.kill(second.pid, signal.SIGTERM)
        outputs = [said(first), said(second)]
    assert [first.returncode, second.returncode] == [85, 85], outputs
    assert all(text.count("exit code 137: starting again") == 1 for text in outputs), outputs
    last = [r for r in run.records() if r["event"] == "stop"][-1]["step"]
    assert run.state(last)["step"] == last
    assert list(run.series("step", "loss")) == list(range(1, last + 1))
