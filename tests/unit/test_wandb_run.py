"""W&B: the real client offline, read back; clients that raise, hang or are missing cost the run nothing."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mf_scale.config.schema import TrackingConfig
from mf_scale.rundir import RunDir
from mf_scale.tracking.wandb_run import WandbRun


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return RunDir(tmp_path / "my-run")


def _records(file: Path) -> list[Any]:
    """The records of a .wandb file: a 7-byte head, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, part, records = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(part)
            records.append(record)
            part = b""
    return records


def _history(record: Any) -> dict[str, Any]:
    return {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}


@pytest.mark.timeout(120)
def test_the_real_client_offline_and_a_resume_in_the_same_run(run: RunDir) -> None:
    config = TrackingConfig(project="proof")
    for first, last in ((1, 3), (3, 5)):
        wandb_run = WandbRun(config, run, {"seed": 7, "train": {"steps": 4}})
        for step in range(first, last):
            wandb_run.log(step, {"loss": 1.0 / step, "lr": 0.1})
        assert wandb_run.finish(0, timeout=50) is None
    run_id = (run.wandb / "run-id").read_text()
    files = sorted(run.wandb.glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
    assert len(files) == 2 and all(f.name == f"run-{run_id}.wandb" for f in files)
    steps = []
    for file in files:
        records = _records(file)
        (opened,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert (opened.run_id, opened.project, opened.display_name) == (run_id, "proof", "my-run")
        assert {c.key: json.loads(c.value_json) for c in opened.config.update}["seed"] == 7
        rows = [_history(r) for r in records if r.WhichOneof("record_type") == "history"]
        steps += [(row["_step"], row["loss"]) for row in rows]
        (exited,) = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
        assert exited.exit_code == 0
    assert steps == [(s, 1.0 / s) for s in (1, 2, 3, 4)]


def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A client of another kind for the child process."""
    folder = tmp_path / "clients"
    folder.mkdir()
    settings = "class Settings:\n    def __init__(self, **k): pass\n"
    (folder / "wandb.py").write_text(settings + code)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")


def _use(run: RunDir, config: TrackingConfig | None = None, **options: Any) -> tuple[WandbRun, float]:
    """Log 20 steps; the run and the seconds that took the caller."""
    wandb_run = WandbRun(config or TrackingConfig(), run, {}, **options)
    start = time.monotonic()
    for step in range(20):
        wandb_run.log(step, {"loss": 1.0})
    return wandb_run, time.monotonic() - start


def test_a_missing_client_is_told_and_nothing_else(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake(tmp_path, monkeypatch, "raise ModuleNotFoundError('no wandb here')\n")
    wandb_run, seconds = _use(run)
    message = wandb_run.finish()
    assert message is not None and "client.log" in message
    assert "no wandb here" in wandb_run.log_file.read_text()
    assert seconds < 0.5


def test_a_client_that_raises_is_contained(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
class Run:
    def log(self, values, step):
        if step % 2: raise ValueError(f"refused step {step}")
        print("took", step)
    def finish(self, exit_code): print("finished with", exit_code)
def init(**k): return Run()
"""
    _fake(tmp_path, monkeypatch, code)
    wandb_run, _ = _use(run)
    message = wandb_run.finish(3)
    assert message is not None and "client exit 10" in message
    log = wandb_run.log_file.read_text()
    assert "took 18" in log and "refused step 19" in log and "finished with 3" in log


@pytest.mark.parametrize("where", ["import", "init", "log", "finish"])
def test_a_client_that_hangs_holds_nothing(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    code = f"""
import time
def maybe(here):
    if here == {where!r}: time.sleep(300)
maybe("import")
class Run:
    def log(self, values, step): maybe("log")
    def finish(self, exit_code): maybe("finish")
def init(**k):
    maybe("init")
    return Run()
"""
    _fake(tmp_path, monkeypatch, code)
    wandb_run, seconds = _use(run)
    assert seconds < 0.5
    start = time.monotonic()
    message = wandb_run.finish(timeout=1.0)
    assert time.monotonic() - start < 4.0
    assert message is not None and "did not finish" in message
    assert wandb_run._child is not None and wandb_run._child.poll() is not None, "no process is left behind"


def test_a_full_queue_drops_and_counts(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(tmp_path, monkeypatch, "import time\ntime.sleep(300)\n")
    wandb_run = WandbRun(TrackingConfig(), run, {}, queue_lines=5)
    big = {"text": "x" * 70_000}  # more than a pipe holds
    start = time.monotonic()
    for step in range(50):
        wandb_run.log(step, big)
    assert time.monotonic() - start < 1.0
    assert wandb_run.dropped >= 40
    assert wandb_run.finish(timeout=0.5) is not None


def test_an_abandoned_client_ends_at_once_and_tells_nothing(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on in another process: no end of it may be told by this one."""
    told = tmp_path / "told"
    _fake(
        tmp_path,
        monkeypatch,
        f"""
from pathlib import Path
class Run:
    def log(self, *a, **k): Path({str(told)!r}).write_text("logged")
    def finish(self, exit_code=None): Path({str(told)!r}).write_text("finished")
def init(**k): return Run()
""",
    )
    wandb_run = WandbRun(TrackingConfig(), run, {})
    wandb_run.log(1, {"loss": 1.0})
    deadline = time.monotonic() + 30
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    wandb_run.abandon()
    wandb_run.log(2, {"loss": 1.0})
    assert wandb_run.finish(1) is None
    time.sleep(0.3)
    assert told.read_text() == "logged"


def test_a_trainer_killed_without_a_word_leaves_a_failed_run_behind(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
class Run:
    def log(self, values, step): print("took", step, flush=True)
    def finish(self, exit_code): print("finished with", exit_code, flush=True)
def init(**k): return Run()
"""
    _fake(tmp_path, monkeypatch, code)
    trainer = f"""
import os, signal, time
from pathlib import Path
from mf_scale.config.schema import TrackingConfig
from mf_scale.rundir import RunDir
from mf_scale.tracking.wandb_run import WandbRun
run = WandbRun(TrackingConfig(), RunDir(Path({str(run.path)!r})), {{}})
run.log(1, {{"loss": 1.0}})
while "took 1" not in run.log_file.read_text(): time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", trainer], timeout=60, check=False)
    assert process.returncode == -9
    deadline = time.monotonic() + 20
    log = run.wandb / "client.log"
    while "finished with 1" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "finished with 1" in log.read_text()


def test_a_run_directory_that_cannot_be_written_is_no_error(run: RunDir) -> None:
    run.path.write_text("a file")
    wandb_run, _ = _use(run)
    assert wandb_run.finish() is not None


def test_off_starts_nothing(run: RunDir) -> None:
    wandb_run, _ = _use(run, TrackingConfig(wandb="disabled"))
    assert wandb_run.finish() is None
    assert not run.path.exists()


@pytest.mark.parametrize(
    ("wandb", "key", "modes"),
    [
        ("auto", None, "offline"),
        ("auto", "k", "online offline"),
        ("offline", "k", "offline"),
        ("online", None, "online offline"),
    ],
)
def test_the_mode_follows_the_key_and_falls_back_to_offline(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: str, key: str | None, modes: str
) -> None:
    code = """
def init(mode, **k):
    print("tried", mode)
    if mode == "online": raise OSError("no network")
    class Run:
        log = lambda self, values, step: None
        finish = lambda self, exit_code: None
    return Run()
"""
    _fake(tmp_path, monkeypatch, code)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    wandb_run, _ = _use(run, TrackingConfig(wandb=wandb))
    assert wandb_run.finish() is None
    tried = [line.split()[1] for line in wandb_run.log_file.read_text().splitlines() if line.startswith("tried")]
    assert " ".join(tried) == modes
