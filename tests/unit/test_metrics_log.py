"""metrics.jsonl: supersession after a rollback, torn lines, non-finite values, disks that refuse."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from mf_scale.errors import UserError
from mf_scale.tracking import metrics
from mf_scale.tracking.metrics import MetricsLog, newest_start, read_metrics


def _steps(path: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(path) if r["event"] == "step"]


def test_lines_carry_event_step_and_time(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl")
    log.write("step", 3, loss=np.float32(0.5), keys=["a"], path=tmp_path)
    (line,) = read_metrics(log.path)
    assert (line["event"], line["step"], line["loss"], line["keys"]) == ("step", 3, 0.5, ["a"])
    assert line["path"] == str(tmp_path) and line["time"] > 1e9
    log.close()
    log.close()


def test_a_line_is_readable_at_once_and_survives_reopening(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path / "metrics.jsonl")
    first.write("step", 1, loss=1.0)
    assert _steps(first.path) == [(1, 1.0)]
    MetricsLog(first.path).write("step", 2, loss=2.0)
    assert _steps(first.path) == [(1, 1.0), (2, 2.0)]


def test_replayed_steps_supersede_the_old_ones(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("start", 0, resumed=False)
    for step in (10, 20, 30):
        log.write("step", step, loss=1.0)
        log.write("save", step, path="x")
    log.write("start", 20, resumed=True)
    log.write("step", 30, loss=2.0)
    assert _steps(log.path) == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert [r["step"] for r in read_metrics(log.path) if r["event"] == "save"] == [10, 20]


def test_a_look_that_was_made_again_supersedes_the_first_one_of_its_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for start, loss in ((1, 1.0), (2, 2.0)):
        log.write("start", 10, start_number=start)
        log.write("validation", 10, loss=loss)
        log.write("evaluation", 10, where="training", split="val", mIoU=loss)
        log.write("evaluation", 10, where="command", split="val", mIoU=loss)
    looks = [
        (r["event"], r.get("where"), r.get("loss") or r["mIoU"])
        for r in read_metrics(log.path)
        if r["event"] != "start"
    ]
    assert [look for look in looks if look[0] == "validation"] == [("validation", None, 2.0)]
    assert [look[1:] for look in looks if look[0] == "evaluation"] == [
        ("command", 1.0),
        ("training", 2.0),
        ("command", 2.0),
    ]


def test_several_rollbacks_leave_one_monotone_series_and_every_start(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for resumed_at, loss in ((0, 0.0), (40, 1.0), (10, 2.0)):
        log.write("start", resumed_at, resumed=resumed_at > 0)
        for step in range(resumed_at + 10, resumed_at + 41, 10):
            log.write("step", step, loss=loss)
        log.write("stop", resumed_at + 40, reason="SIGTERM")
    assert _steps(log.path) == [(10, 0.0), (20, 2.0), (30, 2.0), (40, 2.0), (50, 2.0)]
    assert sum(r["event"] == "start" for r in read_metrics(log.path)) == 3
    assert sum(r["event"] == "stop" for r in read_metrics(log.path)) == 3


@pytest.mark.parametrize("torn", ['{"event": "step", "st', '{"event": "step", "step": 3}', "x" * 200_000])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("step", 1, loss=1.0)
    log.close()
    with log.path.open("a") as file:
        file.write(torn)
    assert _steps(log.path) == [(1, 1.0)], "a reader beside the writer must leave the torn line out too"
    MetricsLog(log.path).write("step", 2, loss=2.0)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{")
    MetricsLog(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_unreadable_lines_in_the_middle_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    first, second = (json.dumps({"event": "step", "step": i, "loss": float(i)}) for i in (1, 2))
    path.write_text(f"{first}\n\0\0\0\n[]\n{second}\n")
    assert _steps(path) == [(1, 1.0), (2, 2.0)]
    assert "2 unreadable lines" in caplog.text


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_nonfinite_floats_are_null_and_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("step", 1, loss=float("nan"), lr=0.1, groups={"a": float("inf"), "b": [1.0, -np.inf]})
    (text,) = log.path.read_text().splitlines()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None and record["lr"] == 0.1 and record["groups"] == {"a": None, "b": [1.0, None]}
    assert record["nonfinite"] == ["loss", "groups.a", "groups.b.1"]


def test_a_place_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/metrics\.jsonl"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot write"):
        MetricsLog(tmp_path)


def test_a_full_disk_is_a_users_mistake_and_leaves_whole_lines(tmp_path: Path) -> None:
    """The file size limit of the process breaks a write in the middle, as a disk that fills up does."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("step", 1, loss=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, limits[1]))
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            log.write("step", 2, loss=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    log.write("step", 2, loss=3.0)
    assert _steps(log.path) == [(1, 1.0), (2, 3.0)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_no_space_left_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="Free some space"):
        MetricsLog(tmp_path / "metrics.jsonl").write("step", 1, loss=1.0)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that the disk still takes; a write beyond that is cut short, the next one refused."""
    room, write = {"bytes": 1 << 40, "error": errno.ENOSPC}, os.write

    def limited(file: int, data: bytes) -> int:
        taken = data[: room["bytes"]]
        if data and not taken:
            raise OSError(room["error"], os.strerror(room["error"]))
        room["bytes"] -= len(taken)
        return write(file, taken)

    monkeypatch.setattr(metrics.os, "write", limited)
    return room


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_lines_wait_for_a_disk_that_is_full_and_keep_their_order(
    tmp_path: Path, disk: dict[str, int], error: int
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", waiting_bytes=metrics.WAITING_BYTES)
    log.write("step", 1, loss=1.0)
    disk["error"], disk["bytes"] = error, 20
    log.write("step", 2, loss=2.0)
    log.write("save", 2, path="x")
    assert _steps(log.path) == [(1, 1.0)] and log.path.read_bytes().endswith(b"}\n"), "no torn line is left"
    problem = str(log.flush())
    assert os.strerror(error) in problem and "2 lines wait in memory" in problem
    disk["bytes"] = 1 << 40
    log.write("step", 3, loss=3.0)
    assert [(r["event"], r["step"]) for r in read_metrics(log.path)] == [
        ("step", 1),
        ("step", 2),
        ("save", 2),
        ("step", 3),
    ]
    assert log.flush() is None and log.close() is None and log.close() is None


def test_flush_and_close_write_what_waits_or_say_what_is_lost(tmp_path: Path, disk: dict[str, int]) -> None:
    for name in ("flush", "close", "lost"):
        log = MetricsLog(tmp_path / name, waiting_bytes=1000)
        disk["bytes"] = 0
        log.write("step", 1, loss=1.0)
        log.write("step", 2, loss=2.0)
        if name == "lost":
            assert "2 lines of" in str(log.close()) and "No space left" in str(log.close() or "No space left")
            continue
        disk["bytes"] = 1 << 40
        assert (log.flush() if name == "flush" else log.close()) is None
        assert _steps(log.path) == [(1, 1.0), (2, 2.0)]


def test_what_waits_is_bounded_and_other_errors_do_not_wait(tmp_path: Path, disk: dict[str, int]) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", waiting_bytes=1000)
    disk["bytes"] = 0
    log.write("step", 1, text="x" * 500)
    with pytest.raises(UserError, match="Free some space"):
        log.write("step", 2, text="x" * 500)
    disk["error"] = errno.EIO
    with pytest.raises(UserError, match="Input/output error"):
        log.write("step", 3)
    disk["bytes"] = 1 << 40
    log.write("step", 4)
    assert [r["step"] for r in read_metrics(log.path)] == [1, 4]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_fsync_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Where a network file system tells of a full disk."""
    log = MetricsLog(tmp_path / "metrics.jsonl", waiting_bytes=1000)

    def refuse(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(metrics.os, "fsync", refuse)
    log.write("step", 1)
    assert os.strerror(error) in str(log.flush())
    if error == errno.ENOSPC:
        log.write("save", 1)
    else:
        with pytest.raises(UserError, match="Input/output error"):
            log.write("save", 1)


def test_lines_of_a_training_carry_the_number_of_its_start(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", start=3)
    log.write("step", 1, loss=1.0)
    assert log.path.read_text().startswith('{"event": "step", "step": 1, "time": ')
    assert list(read_metrics(log.path)[0]) == ["event", "step", "time", "start", "loss"]
    MetricsLog(log.path).write("evaluation", 1, mIoU=0.5)
    assert "start" not in read_metrics(log.path)[1]


def test_lines_of_an_older_start_behind_a_newer_one_do_not_count(tmp_path: Path) -> None:
    old, new = (MetricsLog(tmp_path / "metrics.jsonl", start=number) for number in (1, 2))
    old.write("start", 0)
    for step in (1, 2, 3):
        old.write("step", step, loss=1.0)
    new.write("start", 2)
    old.write("step", 4, loss=1.0)
    new.write("step", 3, loss=2.0)
    old.write("start", 0)
    old.write("validation", 3, loss=1.0)
    new.write("step", 4, loss=2.0)
    old.write("stop", 4, reason="done")
    assert _steps(new.path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert [r["event"] for r in read_metrics(new.path) if r["event"] != "step"] == ["start", "start"]


def test_files_from_before_the_numbers_count_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for resumed_at in (0, 1):
        log.write("start", resumed_at)
        log.write("step", resumed_at + 1, loss=1.0)
    assert newest_start(log.path) == 2 and newest_start(tmp_path / "none") == 0
    newer = MetricsLog(log.path, start=3)
    newer.write("start", 1)
    newer.write("step", 2, loss=2.0)
    assert newest_start(log.path) == 3
    assert _steps(log.path) == [(1, 1.0), (2, 2.0)]


def test_a_line_never_glues_to_half_a_line_of_a_start_that_was_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", start=2)
    for event in ("start", "step"):
        with log.path.open("a") as file:
            file.write('{"event": "step", "step": 7, "ti')
        log.write(event, 0)
    assert [r["event"] for r in read_metrics(log.path)] == ["start", "step"]
    assert "2 unreadable lines" in caplog.text


def test_a_write_that_breaks_off_cuts_nobody_elses_lines(
    tmp_path: Path, disk: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer start writes between the half line and the truncation of it."""
    log = MetricsLog(tmp_path / "metrics.jsonl", start=1, waiting_bytes=metrics.WAITING_BYTES)
    log.write("step", 1, loss=1.0)
    limited = metrics.os.write

    def overtaken(file: int, data: bytes) -> int:
        try:
            return limited(file, data)
        except OSError:
            with log.path.open("a") as other:
                other.write('\n{"event": "start", "step": 1, "start": 2}\n')
            raise

    monkeypatch.setattr(metrics.os, "write", overtaken)
    disk["bytes"] = 20
    log.write("step", 2, loss=2.0)
    assert [r["event"] for r in read_metrics(log.path)] == ["step", "start"]


def test_what_must_not_be_written_is_not(tmp_path: Path, disk: dict[str, int]) -> None:
    """The check stands before every change: opening, writing, what waits, closing."""
    forbidden = [False]

    def check() -> None:
        if forbidden[0]:
            raise UserError("it is another's")

    log = MetricsLog(tmp_path / "metrics.jsonl", start=1, waiting_bytes=1000, check=check)
    log.write("step", 1, loss=1.0)
    disk["bytes"] = 0
    log.write("step", 2, loss=2.0)
    disk["bytes"], forbidden[0] = 1 << 40, True
    before = log.path.read_bytes()
    with pytest.raises(UserError, match="another's"):
        log.write("step", 3, loss=3.0)
    assert "another's, 1 lines wait" in str(log.flush()) and "1 lines of" in str(log.close())
    assert log.path.read_bytes() == before
    log.path.write_bytes(before + b"torn")
    with pytest.raises(UserError, match="another's"):
        MetricsLog(log.path, start=1, check=check)
    assert log.path.read_bytes() == before + b"torn"
