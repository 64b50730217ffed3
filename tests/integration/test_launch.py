"""The launchers: a stop request to a rank starts the run again, one to the launcher ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.program import Run

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def start_local(run: Run, *overrides: str) -> subprocess.Popen[str]:
    """launch/local.sh on a small run, with this environment's mf-scale first on the path."""
    arguments = run.command(*overrides)[4:]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(ROOT / "launch/local.sh"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path},
        start_new_session=True,
    )


def wait_for_step(run: Run, step: int, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while run.last_step() < step:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end(child: subprocess.Popen[str]) -> str:
    try:
        return child.communicate(timeout=120)[0]
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def test_local_starts_again_after_a_stop_request_to_a_rank(tmp_path, packed):
    run = Run(tmp_path / "run", packed)
    child = start_local(run, "train.steps=12")
    wait_for_step(run, 3, child)
    os.kill(int((run.folder / ".lock").read_text().split()[0]), signal.SIGTERM)
    output = end(child)
    assert child.returncode == 0, output
    assert "starting again" in output
    assert list(run.series("step", "loss")) == list(range(1, 13))


def test_local_ends_on_a_stop_request_to_itself(tmp_path, packed):
    run = Run(tmp_path / "run", packed)
    child = start_local(run, "train.steps=400")
    wait_for_step(run, 3, child)
    os.kill(child.pid, signal.SIGTERM)
    output = end(child)
    assert child.returncode == 85, output
    assert "starting again" not in output
    last = [r for r in run.records() if r["event"] == "stop"][-1]["step"]
    assert run.state(last)["step"] == last


def test_multinode_refuses_what_cannot_work(tmp_path):
    script = ROOT / "launch/multinode.sh"
    environment = {"PATH": os.environ["PATH"]}
    for arguments, folder, wanted in (((), ROOT, "usage:"), (("x.yaml",), tmp_path, "is not the project's folder")):
        done = subprocess.run(
            ["bash", str(script), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 2
        assert wanted in done.stderr
