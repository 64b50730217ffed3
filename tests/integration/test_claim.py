"""`mf-scale bench claim` for real: trained and evaluated on painted images."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mf_scale.bench import claim
from mf_scale.cli import main
from mf_scale.config.signals import DEFAULT
from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import read_metrics
from mf_scale.vocabulary import BANDS
from tests.unit.painted import painted_source

CONFIG = str(Path(__file__).parents[2] / "configs/experiments/claim.yaml")
SMALL = [
    "model.num_classes=4",
    "model.backbone.weights=none",
    "model.backbone.freeze_norm=false",
    "model.pixel_decoder={width: 16, mask_channels: 16}",
    "model.decoder={layers: 1, queries: 4, width: 16, heads: 2, feedforward: 32}",
    "data.crop=[64,64]",
    "eval.short_side=64",
    "eval.max_side=128",
    "checkpoint.every_steps=2",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    painted_source(tmp_path)
    return tmp_path / "packed"


@pytest.fixture
def _signals() -> Iterator[None]:
    kept = {name: signal.getsignal(signal.Signals[name]) for name in DEFAULT}
    yield
    for name, handler in kept.items():
        signal.signal(signal.Signals[name], handler)


def _arguments(source: Path, folder: Path, *more: str) -> list[str]:
    told = [f"--source={source}", f"--folder={folder}", "--held-out=2", "--rare=1", "--common=2", "--seeds=0"]
    return ["bench", "claim", CONFIG, *SMALL, *told, *more]


@pytest.mark.usefixtures("_signals")
def test_a_kind_is_trained_and_evaluated(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One kind, in forks of this process, which has loaded everything; the soak has all, each a program of its own."""
    import deepspeed  # noqa: F401 - what takes the time

    def fork(arguments: Sequence[str], processes: int, asked: Sequence[str]) -> int:
        child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(list(arguments))))
        child.start()
        child.join(120)
        if child.exitcode is None:
            child.kill()
            child.join()
        return int(child.exitcode or 0)

    monkeypatch.setattr(claim, "launch", fork)
    monkeypatch.setattr(claim, "KINDS", ("mask_classification",))
    monkeypatch.setattr(claim, "_model", lambda config, kind: {"parameters": 1, "gflop": 1.0})  # a unit test counts
    folder = tmp_path / "claim"
    assert main(_arguments(source, folder, "train.steps=3", "train.log_every=1")) == 0
    assert "| mask_classification (1 seed)" in capsys.readouterr().out
    _hold_to_its_runs(folder, steps=3)


def _hold_to_its_runs(folder: Path, steps: int) -> None:
    """The summary says what the runs say, and their data is the same."""
    orders = set()
    for told in json.loads((folder / "claim.json").read_text())["runs"]:
        run = RunDir(folder / "seed-0" / f"{told['kind']}-lr-0.001")
        records = _records(run)
        assert told["loss"] == [record for record in records if record["event"] == "step"][-1]["loss"]
        assert told["step_seconds"] > 0
        orders.add(json.dumps(next(r["data"] for r in records if r["event"] == "start"), sort_keys=True))
        for split, images in (("train", 3), ("val", 2)):
            results = json.loads((run.report / f"evaluation-{split}.json").read_text())
            assert (results["samples"], results["step"]) == (images, steps)
            part = told[split]
            assert part["mIoU"] == results["mIoU"]
            assert part["rare"]["mIoU"] == results["bands"]["rare"]["mIoU"]
            assert sum(part[band]["classes"] for band in BANDS) == part["seen_classes"]
    assert len(orders) == 1, "one source, one order for all kinds"


@pytest.mark.soak
def test_killed_and_asked_to_stop_it_goes_on(source: Path, tmp_path: Path) -> None:
    """In processes of its own, killed in one training and stopped in the next: what was done is not done again."""
    folder = tmp_path / "claim"
    command = [sys.executable, "-m", "mf_scale.cli", *_arguments(source, folder, "train.steps=12", "train.log_every=1")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kind, number, code in (("per_pixel", signal.SIGKILL, -9), ("per_pixel_plus", signal.SIGTERM, 85)):
        run = RunDir(folder / "seed-0" / f"{kind}-lr-0.001")
        with (tmp_path / "log").open("a") as log:
            child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                deadline = time.monotonic() + 240
                while not any(record["event"] == "save" for record in _records(run)):
                    assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(0.02)
                child.send_signal(number)
                assert child.wait(timeout=60) == code, (tmp_path / "log").read_text()
            finally:
                child.kill()
                child.wait()
        # Whoever was killed outright takes its ranks along: the next start finds the run free.
        deadline = time.monotonic() + 60
        while (run.path / ".lock").exists() and _locked(run) and time.monotonic() < deadline:
            time.sleep(0.1)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "seed 0, per_pixel, " not in done.stdout and "seed 0, per_pixel_plus, " in done.stdout
    _hold_to_its_runs(folder, steps=12)
    for kind in claim.KINDS:
        records = _records(RunDir(folder / "seed-0" / f"{kind}-lr-0.001"))
        assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, 13))
    starts = [record for record in _records(RunDir(folder / "seed-0/per_pixel-lr-0.001")) if record["event"] == "start"]
    assert [start["resumed"] for start in starts] == [False, True]


def _records(run: RunDir) -> list[dict]:
    return read_metrics(run.metrics) if run.metrics.exists() else []


def _locked(run: RunDir) -> bool:
    import fcntl

    with (run.path / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
