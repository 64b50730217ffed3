"""Run a script as several real ranks of one machine, with a time-out, leaving no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mf_scale.distributed.env import RENDEZVOUS


def run_ranks(script: Path, ranks: int, folder: Path, *arguments: str, timeout: float = 120) -> list[str]:
    """The output of every rank; fails with the output of the first that did not exit 0."""
    rendezvous = folder / f"rendezvous-{script.stem}-{os.urandom(4).hex()}"
    children = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            RENDEZVOUS: str(rendezvous),
        }
        command = [sys.executable, str(script), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        children.append(subprocess.Popen(command, env=environment, **pipes))  # type: ignore[call-overload]
    try:
        outputs = [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
    return outputs
