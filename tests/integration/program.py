"""Run the program's own command line as a person would, and read what the run left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SMALL = [
    "model.backbone.name=test_efficientnet",
    "model.backbone.weights=none",
    "model.pixel_decoder.width=32",
    "model.pixel_decoder.mask_channels=32",
    "model.decoder.layers=2",
    "model.decoder.queries=10",
    "model.decoder.width=32",
    "model.decoder.heads=2",
    "model.decoder.feedforward=64",
    "data.crop=[64,64]",
    "data.workers=1",
    "data.log_keys=true",
    "train.precision=fp32",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.log_every=1",
    "train.collective_timeout=60",
    "checkpoint.every_steps=4",
    "checkpoint.every_minutes=0",
    "eval.every_steps=0",
    "optimizer.lr=0.001",
]
"""A model that is whole but small: dropout stays on, so that its seeding is tested too. timm made the backbone for
tests; its norms and its stochastic depth are an efficientnet's, at a fourth of a step and a seventeenth of a save."""

LARGER = "model.backbone.name=tf_efficientnet_lite0"
"""For tests that fill a disk, or meet a step from outside: 38 MB a checkpoint in place of 2, 0.3 s a step of 0.1."""


def zero(stage: int) -> list[str]:
    """A ZeRO stage; at 3 as for a large model, of which DeepSpeed would keep a weight whole below 1e5 elements: all."""
    gathering = ["deepspeed.zero_optimization.stage3_param_persistence_threshold=4000"]
    return [f"zero.stage={stage}", *(gathering if stage == 3 else [])]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Of a rank: with two of them waiting for each other at every operator a step took 60 s in place of 2 on busy cores."""


class Run:
    """One run directory and the commands on it."""

    def __init__(self, folder: Path, packed: Path, *settings: str) -> None:
        """`settings` are those of every start."""
        self.folder = folder
        self.sources = [f"data.train={packed}/train", f"data.val={packed}/val", f"run_dir={folder}", *settings]

    def command(self, *overrides: str, processes: int = 2) -> list[str]:
        config = Path(__file__).parents[2] / "configs/base.yaml"
        extra = [*SMALL, *self.sources, *overrides, "--processes", str(processes)]
        return [sys.executable, "-m", "mf_scale.cli", "train", str(config), *extra]

    def train(
        self, *overrides: str, processes: int = 2, timeout: float = 150, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run to the end."""
        return subprocess.run(
            self.command(*overrides, processes=processes),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, **ONE_THREAD, **environment},
        )

    def train_until(self, step: int, number: int, *overrides: str, processes: int = 2, everyone: bool = False) -> int:
        """Start, wait until `step` was logged, send signal `number` to rank 0 (or the whole group); the exit code."""
        log = (self.folder.parent / f"{self.folder.name}.log").open("a")
        child = subprocess.Popen(
            self.command(*overrides, processes=processes),
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **ONE_THREAD},
        )
        try:
            deadline = time.monotonic() + 120
            while self.last_step() < step:
                assert child.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.02)
            if everyone:
                os.killpg(child.pid, number)
            else:
                os.kill(int((self.folder / ".lock").read_text().split()[0]), number)
            return child.wait(timeout=60)
        finally:
            log.close()
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def last_step(self) -> int:
        return max((r["step"] for r in self.records() if r["event"] == "step"), default=0)

    def records(self) -> list[dict[str, Any]]:
        from mf_scale.tracking.metrics import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    def series(self, event: str, key: str) -> dict[int, Any]:
        """Step -> value; fails where a step stands twice."""
        pairs = [(r["step"], r[key]) for r in self.records() if r["event"] == event]
        assert len(dict(pairs)) == len(pairs), f"a step stands twice in {event}"
        return dict(pairs)

    def state(self, step: int) -> dict[str, Any]:
        return json.loads((self.folder / f"checkpoints/step-{step:08d}/state.json").read_text())
