"""W&B: the real client offline, read back; clients that raise, hang or are missing cost the run nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mf_scale.config.schema import TrackingConfig
from mf_scale.rundir import RunDir
from mf_scale.tracking.pictures import write_class_map
from mf_scale.tracking.wandb_client import Client
from mf_scale.tracking.wandb_run import WandbRun, client_lines, encoded, opening
from tests.unit.wandb_files import segments


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return RunDir(tmp_path / "my-run")


@pytest.mark.timeout(120)
def test_the_real_client_offline_and_a_resume_in_the_same_run(run: RunDir) -> None:
    config = TrackingConfig(project="proof")
    for first, last in ((1, 3), (3, 5)):
        wandb_run = WandbRun(config, run, {"seed": 7, "train": {"steps": 4}})
        for step in range(first, last):
            wandb_run.record(_line(step, loss=1.0 / step, lr=0.1))
        assert wandb_run.finish(0, timeout=50) is None
    run_id = (run.wandb / "run-id").read_text()
    told = segments(run.wandb, run_id)
    assert len(told) == 2
    for segment in told:
        assert (segment.run.run_id, segment.run.project, segment.run.display_name) == (run_id, "proof", "my-run")
        assert segment.config["seed"] == 7 and segment.exit_code == 0
    rows = [row for segment in told for row in segment.rows]
    assert [(row["_step"], row["step"], row["train/loss"], row["_timestamp"]) for row in rows] == [
        (s, s, 1.0 / s, 100.0 + s) for s in (1, 2, 3, 4)
    ]


@pytest.mark.timeout(120)
def test_steps_that_the_run_knows_are_not_told_twice_in_whichever_process(run: RunDir) -> None:
    """W&B's steps only grow: what it was told of a step stays, until the run is past that."""
    for start, steps in enumerate(((1, 2, 3, 4), (3, 4, 5), (2, 3, 4, 5, 6))):
        wandb_run = WandbRun(TrackingConfig(), run, {})
        for step in steps:
            wandb_run.record(_line(step, loss=start + step / 10))
        assert wandb_run.finish(0, timeout=50) is None
    rows = [row for segment in segments(run.wandb, (run.wandb / "run-id").read_text()) for row in segment.rows]
    told = [(row["step"], row["train/loss"]) for row in rows]
    assert told == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 1.5), (6, 2.6)]
    assert "4 rows of replayed steps were held back" in (run.wandb / "client.log").read_text()


@pytest.mark.timeout(120)
def test_one_axis_an_end_in_the_summary_an_alert_and_nothing_outside_the_folder(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb_run = WandbRun(TrackingConfig(), run, {})
    wandb_run.record({"event": "start", "step": 0, "time": 1.0, "start": 1, "steps": 9, "world": 2})
    wandb_run.record({"event": "save", "step": 4, "time": 3.0, "start": 1})
    wandb_run.record({"event": "stop", "step": 5, "time": 4.0, "start": 1, "reason": "too hot", "exit_code": 3})
    wandb_run.alert("the run was aborted", "too hot", "ERROR")
    assert wandb_run.finish(85, timeout=50, preempting=True) is None
    (told,) = segments(run.wandb, (run.wandb / "run-id").read_text())
    assert ("step", "") in told.metrics and ("*", "step") in told.metrics
    assert ("validation/loss", "step") in told.metrics
    expected = {"run/state": "guard", "run/reason": "too hot", "run/step": 5, "run/steps": 9, "run/saved_step": 4}
    assert {name: told.summary[name] for name in expected} == expected
    assert told.alerts == [("the run was aborted", "too hot", "ERROR")]
    assert told.kinds.count("preempting") == 1 and told.exit_code == 85
    assert not (tmp_path / "home").exists(), "nothing is staged outside the run directory"


@pytest.mark.timeout(120)
def test_tables_and_pictures_of_an_evaluation(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run.report.mkdir(parents=True)
    image = np.full((30, 40, 3), 90, np.uint8)
    cv2.imwrite(str(run.report / "val-00-image.png"), image)
    classes = np.array([[-1, 0], [1, 2]]).repeat(15, 0).repeat(20, 1)
    write_class_map(run.report / "val-00-classes.png", classes)
    views = [
        {"title": "image", "file": "val-00-image.png"},
        {"title": "prediction", "file": "val-00-image.png", "classes": "val-00-classes.png"},
    ]
    results = {
        "split": "val",
        "class_names": ["sky", "cat", "dog"],
        "things": [False, True, True],
        "semantic": {"per_class": {"IoU": [0.5, 0.9, None], "pixels": [5, 9, 0]}},
        "bands": {"of_class": ["common", "rare", None], "rare": {"classes": 1, "mIoU": 0.9, "PQ": None, "AP": None}},
        "pictures": [{"position": 0, "key": "a", "why": "worst", "views": views}],
    }
    (run.report / "evaluation-val.json").write_text(json.dumps({"step": 4, **results}))
    wandb_run = WandbRun(TrackingConfig(), run, {})
    wandb_run.evaluation(4, "evaluation-val.json")
    assert wandb_run.finish(0, timeout=50) is None, (run.wandb / "client.log").read_text()
    (told,) = segments(run.wandb, (run.wandb / "run-id").read_text())
    (row,) = told.rows
    assert row["step"] == 4
    assert told.table(row, "evaluation/val/bands") == [["rare", 1, 0.9, None, None]]
    assert told.table(row, "evaluation/val/classes") == [
        ["cat", 1, True, "rare", 0.9, 9],
        ["sky", 0, False, "common", 0.5, 5],
    ]
    masks = told.masks(row, "evaluation/val/pictures")
    assert np.array_equal(masks["prediction"], classes + 1)
    names = told.config["_wandb"]["mask/class_labels"]["evaluation/val/pictures_wandb_delimeter_prediction"]["value"]
    assert names == {"0": "none", "1": "sky", "2": "cat", "3": "dog"}
    assert not (tmp_path / "home").exists()


@pytest.mark.timeout(120)
def test_without_a_network_the_real_client_falls_back_to_files(run: RunDir) -> None:
    """The service of a client that failed to reach W&B still holds the run's id: without its end there was no run."""
    lines = [
        {**opening(TrackingConfig(), run, online=True, resume=True), "config": {}},
        *client_lines({"record": _line(1, loss=2.0)}),
        {"finish": 0},
    ]
    code = "import sys\nfrom mf_scale.tracking import wandb_client as c\nc.INIT_SECONDS = 2\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(c.serve(sys.stdin.buffer))"],
        input=b"".join(encoded(line) for line in lines),
        env={**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true"},
        capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and b"connection refused" in done.stderr, done.stderr.decode()
    (told,) = segments(run.wandb, (run.wandb / "run-id").read_text())
    assert [(row["step"], row["train/loss"]) for row in told.rows] == [(1, 2.0)]


def _line(step: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {"event": "step", "step": step, "time": 100.0 + step, "start": 1, **values}


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
        wandb_run.record(_line(step, loss=1.0))
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
    big = {f"value_{number}": 1.0 for number in range(5_000)}  # more than a pipe holds
    start = time.monotonic()
    for step in range(50):
        wandb_run.record(_line(step, **big))
    assert time.monotonic() - start < 1.0
    assert wandb_run.dropped >= 40
    assert wandb_run.finish(timeout=0.5) is not None


def test_a_client_that_was_killed_is_not_waited_for(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake(tmp_path, monkeypatch, "def init(**k): return None\n")
    wandb_run = WandbRun(TrackingConfig(), run, {}, queue_lines=20)
    child = wandb_run._child
    assert child is not None
    child.kill()
    child.wait(timeout=30)
    deadline = time.monotonic() + 30
    while not wandb_run.dropped:
        assert time.monotonic() < deadline
        wandb_run.record({"event": "step", "step": 1, "loss": 1.0})
        time.sleep(0.01)
    began = time.monotonic()
    sentence = wandb_run.finish(0, timeout=20)
    assert sentence is not None and "did not get everything" in sentence and time.monotonic() - began < 5


def test_a_line_that_was_cut_off_ends_nothing(run: RunDir, tmp_path: Path) -> None:
    """The trainer is killed while it tells it: the client still tells the end."""
    lines = b'{"summary": {}}\n{"row": {"loss": 1.0\n{"finish": 0}\n'
    command = [sys.executable, "-m", "mf_scale.tracking.wandb_client"]
    done = subprocess.run(command, input=lines, capture_output=True, timeout=60, check=False)
    assert done.returncode == 3 and b"Traceback" not in done.stderr  # three lines failed, for want of an opening too


def test_an_evaluation_that_was_replaced_is_not_told_as_the_one_before(run: RunDir) -> None:
    client = Client()
    run.report.mkdir(parents=True)
    (run.report / "evaluation-val.json").write_text(json.dumps({"step": 200, "split": "val"}))
    client._run, client._report = object(), run.report
    assert client.carry_out({"evaluation": "evaluation-val.json", "at": 100})


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
    wandb_run.record(_line(1, loss=1.0))
    deadline = time.monotonic() + 30
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    wandb_run.abandon()
    wandb_run.record(_line(2, loss=1.0))
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
from mf_scale.tracking.wandb_client import Client
from mf_scale.tracking.wandb_run import WandbRun
run = WandbRun(TrackingConfig(), RunDir(Path({str(run.path)!r})), {{}})
run.record({{"event": "step", "step": 1, "loss": 1.0}})
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
