"""The state of a run from its files: each way to end, each file missing, what restarts cost, how it is shown."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mf_scale.cli import main
from mf_scale.rundir import RunDir
from mf_scale.tracking.after import what_came_before
from mf_scale.tracking.launches import FINAL, GIVEN_UP, LEFT, REQUEUED
from mf_scale.tracking.starts import ENDS, Start
from mf_scale.tracking.state import STATES
from mf_scale.tracking.status import RunStatus, run_status
from mf_scale.tracking.status_text import WIDTH, page, table
from tests.unit.histories import Maker


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path / "run")


def status_of(maker: Maker, *, later: float = 5.0, queue: str | None = None) -> RunStatus:
    return run_status(maker.run, queue=lambda _: queue, now=maker.time + later)


def held(maker: Maker, *, pid: int | None = None, host: str | None = None) -> None:
    """The lock as its holder left it, at the present of the history."""
    lock = maker.run.path / ".lock"
    lock.write_text(f"{pid or os.getpid()} {host or socket.gethostname()} 0123456789abcdef 7 0 1\n")
    os.utime(lock, (maker.time, maker.time))


def ended_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def two_starts(maker: Maker, **first: Any) -> None:
    """Saved at 4, reached 7, gone on from 4 to 9; 30 s in between, 3 s of them up to its first step."""
    maker.begun(0, **first)
    maker.steps(4)
    maker.saved()
    maker.steps(7)
    maker.passed(27)
    maker.begun(4)
    maker.steps(9, seconds=3)


def test_what_a_restart_cost_is_exact(maker: Maker) -> None:
    two_starts(maker)
    status = status_of(maker)
    first, second = status.starts
    assert (first.from_step, first.reached, first.lost_steps, first.lost_images) == (0, 7, 3, 24)
    assert (first.lost_seconds, first.down_seconds) == (6.0, 30.0)
    assert (second.from_step, second.reached, second.lost_steps, second.down_seconds) == (4, 9, None, None)
    assert (status.restarts, status.lost_steps, status.lost_seconds, status.down_seconds) == (1, 3, 6.0, 30.0)
    assert (status.step, status.steps, status.unsaved_steps, status.skipped) == (9, 100, 5, 0)
    assert status.hour is not None and status.hour.step_seconds == (3 * 2 + 5 * 3) / 8, "steps that hold"


def test_steps_beyond_the_last_line_are_known_from_the_progress(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(20, every=10)
    maker.saved()
    maker.steps(37, every=10)
    maker.passed(10)
    maker.begun(20)
    assert [one.lost_steps for one in status_of(maker).starts] == [17, None]
    (maker.run.path / "progress").unlink()
    assert [one.lost_steps for one in status_of(maker).starts] == [10, None], "as far as its lines tell"


def test_lost_work_may_reach_back_over_several_starts(maker: Maker) -> None:
    """The checkpoint of step 8 turned out damaged: start 3 went on from 4, so that start 2's kept steps are lost."""
    maker.begun(0)
    maker.steps(4)
    maker.saved()
    maker.steps(8)
    maker.saved()
    maker.steps(9)
    maker.passed(20)
    maker.begun(8)
    maker.steps(10)
    maker.passed(20)
    maker.begun(4)
    assert [(one.lost_steps, one.lost_seconds) for one in status_of(maker).starts] == [
        (1, 2.0),
        (6, 12.0),
        (None, None),
    ]


def test_where_no_save_tells_when_a_step_was_reached_the_time_lost_is_not_known(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(7)
    maker.begun(4)
    status = status_of(maker)
    assert (status.starts[0].lost_steps, status.starts[0].lost_seconds, status.lost_seconds) == (3, None, None)


def test_without_progress_and_lines_of_a_lost_node_the_successor_tells_how_far_it_came(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(3, slots=False)
    maker.begun(8)
    first = status_of(maker).starts[0]
    assert (first.reached, first.lost_steps) == (8, 0)


ENDINGS = [
    (("done", 0), None, "done", "done"),
    (("SIGTERM", 85), None, "stopped", "stopped"),
    (("SIGTERM", 85), (85, "a preemption", REQUEUED), "stopped", "requeued"),
    (("deadline", 85), (85, "USR1 ahead of the time limit", LEFT, "USR1"), "stopped", "stopped"),
    (("a sample is bad", 3), None, "guard", "guard"),
    (("the file is gone", 2), (2, "a mistake to be mended", FINAL), "mistake", "mistake"),
    (("storage failed", 75), (75, "a fault", REQUEUED), "fault", "requeued"),
    (("storage failed", 75), None, "fault", "failed"),
    (("RuntimeError: no", 1), (1, "a rank failed (exit code 1)", REQUEUED), "failed", "requeued"),
    (None, (137, "a rank was killed by signal 9", REQUEUED), "killed", "requeued"),
    (None, (137, "a rank was killed by signal 9", GIVEN_UP), "killed", "given up"),
    (None, (143, "SLURM ended the job: scancel", FINAL, "TERM"), "killed", "ended"),
    (None, None, None, "silent"),
]


@pytest.mark.parametrize(("stop", "script", "end", "word"), ENDINGS)
def test_each_way_to_end(maker: Maker, stop: Any, script: Any, end: str | None, word: str) -> None:
    if script:
        maker.launched("7", 0, "node1")
    maker.begun(0, **({"job": "7", "restart": 0} if script else {}))
    maker.steps(5)
    if stop:
        maker.stopped(*stop)
    if script:
        code, why, then, *signals = script
        maker.script_ended("7", 0, code, why, then, *signals)
    status = status_of(maker, later=3600)
    assert (status.starts[-1].end, status.state.word) == (end, word)
    assert end is None or end in ENDS
    assert word in STATES
    if end in ("guard", "mistake", "fault", "failed") and stop:
        assert status.starts[-1].why == stop[0], "the training knows it better than the job script"
    elif script:
        assert status.starts[-1].why == script[1]
    if word == "given up":
        assert "1 start" not in status.state.sentence and "signal 9" in status.state.sentence


def test_the_number_of_fruitless_starts_is_said(maker: Maker) -> None:
    maker.launched("7", 0, "node1")
    maker.begun(0, job="7", restart=0)
    maker.steps(5)
    maker.script_ended("7", 0, 1, "a rank failed (exit code 1)", REQUEUED)
    for restart in (1, 2, 3):
        maker.passed(60)
        maker.launched("7", restart, "node1")
        maker.script_ended("7", restart, 1, "a rank failed (exit code 1)", GIVEN_UP if restart == 3 else REQUEUED)
    state = status_of(maker).state
    assert state.word == "given up" and state.sentence.startswith("given up after 3 starts that came no further")


def test_a_start_whose_node_was_lost_is_cut_off_once_there_is_a_next_one(maker: Maker) -> None:
    maker.launched("7", 0, "node1", "node2")
    maker.begun(0, job="7", restart=0)
    maker.steps(5)
    assert status_of(maker, later=3600).state.word == "silent"
    maker.passed(40)
    maker.launched("7", 1, "node3")
    status = status_of(maker)
    assert [one.end for one in status.starts] == ["cut off", None]
    assert (status.state.word, status.state.sentence) == ("starting", "starting on node3")
    assert (status.starts[1].number, status.starts[1].nodes, status.step) == (None, ("node3",), 5)


def test_without_a_job_script_a_start_that_left_no_word_is_silent(maker: Maker) -> None:
    two_starts(maker)
    assert status_of(maker).starts[0].end == "silent"


def test_a_run_that_went_back_is_told_so(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(4)
    maker.saved()
    maker.steps(7)
    maker.line("rollback", 7, spike=7, to=4, skipped=2, keys=[])
    maker.begun(4)
    maker.steps(6)
    status = status_of(maker)
    assert (status.starts[0].end, status.starts[0].why) == ("went back", "the loss of step 7 jumped")
    assert (status.starts[0].lost_steps, status.restarts, status.lost_steps) == (3, 0, 3)


def test_a_rollback_within_one_launch_leaves_its_end_to_the_last_session(maker: Maker) -> None:
    maker.launched("7", 0, "node1")
    maker.begun(0, job="7", restart=0)
    maker.steps(4)
    maker.line("rollback", 4, spike=4, to=0, skipped=1, keys=[])
    maker.begun(0, job="7", restart=0)
    maker.steps(6)
    maker.script_ended("7", 0, 137, "a rank was killed by signal 9", REQUEUED)
    assert [one.end for one in status_of(maker).starts] == ["went back", "killed"]


def test_only_a_job_script_has_been_there(maker: Maker) -> None:
    maker.launched("7", 0, "node1")
    status = status_of(maker)
    assert (status.state.word, status.step, status.steps, status.eta_seconds) == ("starting", 0, None, None)
    maker.passed(30)
    maker.script_ended("7", 0, 2, "a mistake to be mended", FINAL)
    assert status_of(maker).state.sentence == "stopped by a mistake: a mistake to be mended"


def test_a_survivors_lines_count_for_nothing(maker: Maker) -> None:
    two_starts(maker)
    before = status_of(maker)
    number, maker.start = maker.start, 1
    maker.line("step", 50, loss=1.0, images_per_second=1.0, step_time=1.0, data_wait=0.0, updates=50)
    maker.line("save", 50, path="step-00000050")
    maker.start = number
    after = status_of(maker)
    assert (after.step, after.loss, after.starts) == (before.step, before.loss, before.starts)


def test_clocks_that_differ_between_nodes_do_not_reorder_the_starts(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(4)
    maker.passed(-100)
    maker.begun(4)
    maker.steps(6)
    starts = status_of(maker).starts
    assert [one.number for one in starts] == [1, 2] and starts[0].lost_steps == 0
    assert starts[0].down_seconds == 0.0


@pytest.mark.parametrize(
    ("pid", "host", "later", "word"),
    [
        ("mine", None, 5, "running"),
        ("mine", None, 5000, "running"),
        ("dead", None, 5, "silent"),
        ("dead", "elsewhere", 5, "running"),
        ("dead", "elsewhere", 5000, "silent"),
    ],
)
def test_whether_it_lives_by_its_lock(maker: Maker, pid: str, host: str | None, later: float, word: str) -> None:
    maker.begun(0)
    maker.steps(5)
    held(maker, pid=ended_pid() if pid == "dead" else None, host=host)
    state = status_of(maker, later=later).state
    assert state.word == word
    assert ("without a sign of life" in state.sentence) == (word == "running" and later > 600)


@pytest.mark.parametrize(
    ("queue", "word"), [("PENDING (Resources)", "queued"), ("RUNNING None", "running"), ("CANCELLED None", "silent")]
)
def test_slurm_knows_better_than_signs_of_life(maker: Maker, queue: str, word: str) -> None:
    maker.launched("7", 0, "node1")
    maker.begun(0, job="7", restart=0)
    maker.steps(5)
    state = status_of(maker, later=100, queue=queue).state
    assert state.word == word
    assert word != "queued" or state.sentence == "waiting in the queue (job 7): (Resources)"


def test_a_job_that_was_refused_beside_it_does_not_hide_the_one_that_trains(maker: Maker) -> None:
    maker.launched("7", 0, "a1")
    maker.begun(0, job="7", restart=0)
    held(maker)
    maker.steps(5)
    maker.launched("8", 0, "a2")
    maker.time += 9
    maker.script_ended("8", 0, 2, "a mistake to be mended", "final")
    assert status_of(maker).state.word == "running"


def test_slurm_is_not_asked_about_a_run_that_is_settled(maker: Maker) -> None:
    def unasked(job: str) -> str:
        raise AssertionError(job)

    maker.begun(0, job="7", restart=0)
    maker.steps(5)
    maker.stopped("done", 0)
    assert run_status(maker.run, queue=unasked).state.word == "done"


def test_a_new_start_that_has_said_nothing_yet_is_seen_by_its_lock(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(5)
    maker.stopped("SIGTERM", 85)
    held(maker)
    assert status_of(maker).state.word == "stopped"
    maker.passed(10)
    held(maker)
    assert status_of(maker).state.sentence == f"starting on {socket.gethostname()}"


def test_speed_and_time_left(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(40, every=5, seconds=4)
    maker.steps(60, every=5, seconds=2)
    status = status_of(maker)
    assert status.last is not None and status.hour is not None
    assert (status.last.images_per_second, status.last.step_seconds, status.last.data_wait_seconds) == (4.0, 2.0, 0.25)
    assert status.hour.step_seconds == pytest.approx((35 * 4 + 20 * 2) / 55)
    assert status.hour.images_per_second == pytest.approx(8 / ((35 * 4 + 20 * 2) / 55))
    assert status.eta_seconds == pytest.approx(40 * (35 * 4 + 20 * 2) / 55)
    assert status.eta_with_restarts_seconds == pytest.approx(40 * (40 * 4 + 20 * 2 + 5) / 60)


def test_the_last_hour_only(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(20, seconds=300)
    maker.steps(80, seconds=60)
    hour = status_of(maker).hour
    assert hour is not None and hour.step_seconds == 60.0


def test_the_checkpoint_is_the_newest_that_is_committed(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(4)
    maker.saved()
    maker.steps(6)
    (maker.run.checkpoints / "step-00000006").mkdir()  # without a manifest
    saved = status_of(maker).checkpoint
    assert saved is not None
    assert (saved.step, saved.bytes, saved.seconds, saved.stall) == (4, 5_000_000, 1.0, 0.5)
    (maker.run.metrics).unlink()
    unknown = status_of(maker).checkpoint
    assert unknown is not None and (unknown.step, unknown.bytes) == (4, None)


def test_time_without_training_is_counted_once(maker: Maker) -> None:
    """100 s until a start that never came to training, 50 s more until the next one, 2 s to its first step."""
    maker.launched("7", 0, "node1")
    maker.begun(0, job="7", restart=0)
    maker.steps(4)
    maker.passed(100)
    maker.launched("7", 1, "node1")
    maker.script_ended("7", 1, 75, "a fault", REQUEUED)
    maker.passed(50)
    maker.launched("7", 2, "node1")
    maker.begun(4, job="7", restart=2)
    maker.steps(6)
    status = status_of(maker)
    assert [one.down_seconds for one in status.starts] == [152.0, 52.0, None]
    assert status.down_seconds == 152.0


def test_time_left_counts_what_holds_up_the_steps(maker: Maker) -> None:
    maker.begun(0)
    maker.steps(10)
    maker.passed(40)
    maker.steps(30)
    assert status_of(maker).eta_seconds == pytest.approx(70 * (2 * 29 + 40) / 29)


def test_lines_are_whole_wherever_a_piece_of_the_file_ends(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    two_starts(maker)
    before = status_of(maker)
    for size in (1, 100, 1000):
        monkeypatch.setattr("mf_scale.tracking.history._CHUNK_BYTES", size)
        assert status_of(maker) == before


def test_lines_that_cannot_be_read_are_left_out(maker: Maker) -> None:
    two_starts(maker)
    before = status_of(maker)
    with maker.run.metrics.open("ab") as file:
        file.write(b'\xff\n[1]\n{"event": "save", "step": "x"}\n{"event": "step", "step": 90, "time": 1.0, "lo\n')
        file.write(b'{"event": "step", "step": 95, "time": 1.0}')
    with (maker.run.path / "progress").open("ab") as file:
        file.write(b"rubbish")
    assert status_of(maker).starts == before.starts


def test_runs_from_before_starts_had_numbers_are_read(maker: Maker) -> None:
    two_starts(maker)
    lines = [json.loads(line) for line in maker.run.metrics.read_text().splitlines()]
    for line in lines:
        del line["start"]
    maker.run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (maker.run.path / "progress").unlink()
    assert [(one.number, one.lost_steps) for one in status_of(maker).starts] == [(1, 3), (2, None)]


def test_what_a_start_tells_of_the_one_before(maker: Maker) -> None:
    assert what_came_before(maker.run, start=1, step=0, job=None, restart=None) is None
    maker.launched("7", 0, "node1")
    maker.begun(0, job="7", restart=0)
    maker.steps(4)
    maker.saved()
    maker.steps(7)
    maker.script_ended("7", 0, 137, "a rank was killed by signal 9", REQUEUED)
    maker.launched("7", 1, "node1")
    told = what_came_before(maker.run, start=2, step=4, job="7", restart=1)
    assert told is not None and told.pop("seconds_down") == pytest.approx(time.time() - maker.time, abs=5)
    assert told == {
        "end": "killed",
        "reason": "a rank was killed by signal 9",
        "reached": 7,
        "lost_steps": 3,
        "lost_seconds": 6.0,
    }


def long_run(maker: Maker) -> None:
    """A run of all kinds of starts, of which one never came to training."""
    two_starts(maker)
    maker.passed(30)
    maker.launched("123456_78", 0, *(f"node{i}" for i in range(6)), ranks=48)
    maker.begun(4, job="123456_78", restart=0)
    maker.steps(9, seconds=3)
    maker.passed(30)
    maker.launched("123456_78", 1, "node1")
    maker.script_ended("123456_78", 1, 75, "a fault of the surroundings or a hang (exit code 75)", REQUEUED)


def test_the_page_fits_and_tells_all(maker: Maker) -> None:
    long_run(maker)
    text = page(status_of(maker), colour=False)
    assert max(map(len, text.splitlines())) <= WIDTH
    parts = ("9 of 100", "9.0%", "2.67 images/s", "3,000 ms a step", "step 4", "5 steps since", "8 steps, 64 images")
    for part in (*parts, "requeued", "123456_78.1", "3 (6 s)", "cut off without a word", "0 → 7"):
        assert part in " ".join(text.split()), part
    assert "\x1b[" not in text and "\x1b[32m" not in page(status_of(maker), colour=False)
    assert "\x1b[1m" in page(status_of(maker), colour=True)


def test_large_numbers_are_wrapped(maker: Maker) -> None:
    long_run(maker)
    big = 10**12
    status = replace(status_of(maker), lost_steps=big, lost_images=1000 * big, lost_seconds=1e9, restarts=big)
    text = page(replace(status, unsaved_steps=big, eta_seconds=1e12, steps=big), colour=False)
    assert max(map(len, text.splitlines())) <= WIDTH


def test_of_many_starts_the_page_lists_the_newest(maker: Maker) -> None:
    for _ in range(50):
        maker.begun(0)
        maker.steps(1)
    text = page(status_of(maker), colour=False)
    assert "30 earlier starts" in text and "\n31  " in text and "\n30  " not in text and "\n50 " in text


def test_a_table_of_runs_fits(maker: Maker, tmp_path: Path) -> None:
    long_run(maker)
    other = Maker(tmp_path / ("a long name of a run in a sweep " * 6))
    text = table([status_of(maker), status_of(other)], colour=False).splitlines()
    assert len(text) == 3 and max(map(len, text)) <= WIDTH
    assert "requeued" in text[1] and "9/100" in text[1] and "not started" in text[2]


SCHEMA = {
    "run", "asked", "state", "heard", "step", "steps", "updates", "skipped", "quarantined", "loss", "last", "hour",
    "eta_seconds", "eta_with_restarts_seconds", "checkpoint", "unsaved_steps", "validation", "restarts", "lost_steps",
    "lost_images", "lost_seconds", "down_seconds", "starts",
}  # fmt: skip
START_SCHEMA = {
    "number", "job", "restart", "nodes", "ranks", "launched", "began", "first_step", "last_step", "heard",
    "from_step", "reached", "end", "why", "then", "lost_steps", "lost_images", "lost_seconds", "down_seconds",
    "global_batch",
}  # fmt: skip


def test_json_keeps_its_names(maker: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    """Programs of others read it: a name may be added here, none may go."""
    long_run(maker)
    maker.line("validation", 9, loss=2.5, weights="raw")
    assert main(["status", str(maker.run.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == SCHEMA
    assert all(set(start) == START_SCHEMA for start in told["starts"])
    assert set(told["state"]) == {"word", "sentence", "since"}
    assert set(told["last"]) == set(told["hour"]) == {"images_per_second", "step_seconds", "data_wait_seconds"}
    assert set(told["checkpoint"]) == {"step", "name", "time", "bytes", "seconds", "stall"}
    assert told["validation"] == {"step": 9, "loss": 2.5}


def test_the_command(maker: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_starts(maker)
    (tmp_path / "empty").mkdir()
    assert main(["status", str(maker.run.path)]) == 0
    assert "9 of 100" in capsys.readouterr().out
    assert main(["status", str(maker.run.path), str(tmp_path / "empty"), "--json"]) == 0
    words = [json.loads(line)["state"]["word"] for line in capsys.readouterr().out.splitlines()]
    assert words == ["silent", "not started"]
    for wrong in (tmp_path / "empty", tmp_path / "nowhere"):
        assert main(["status", str(wrong)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("mf-scale: ") and str(wrong) in said and said.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main(["status", str(maker.run.path), "--watch", "nan"])


def test_a_queue_that_does_not_answer_is_asked_once(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "asked"
    squeue = tmp_path / "bin/squeue"
    squeue.parent.mkdir()
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    maker.begun(0, job="7", restart=0)
    maker.steps(5)

    def states(answer: str) -> list[str]:
        squeue.write_text(f"#!/bin/sh\necho asked >> '{asked}'\n{answer}\n")
        squeue.chmod(0o755)
        assert main(["status", str(maker.run.path), str(maker.run.path), "--json"]) == 0
        return [json.loads(line)["state"]["word"] for line in capsys.readouterr().out.splitlines()]

    assert states("echo 'PENDING Priority'") == ["queued", "queued"]
    assert asked.read_text().count("asked") == 2
    assert states("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1") == ["silent"] * 2
    assert asked.read_text().count("asked") == 3
    assert states("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1") == ["silent"] * 2
    assert asked.read_text().count("asked") == 5


def test_a_long_history_is_read_quickly(maker: Maker) -> None:
    """0.2 s on an idle machine; the bound leaves room for a busy one, not for parsing every line in full twice."""
    maker.begun(0)
    maker.steps(1)
    line = maker.run.metrics.read_bytes().splitlines(keepends=True)[-1]
    more = {"grad_norms": {f"group {i}": 1.0 for i in range(10)}}
    record = {**json.loads(line), **more}
    with maker.run.metrics.open("a") as file:
        for step in range(2, 100_001):
            record |= {"step": step, "time": maker.time + step, "updates": step}
            file.write(json.dumps(record) + "\n")
    began = time.process_time()
    status = run_status(RunDir(maker.run.path))
    assert status.step == 100_000 and time.process_time() - began < 2.0


def test_a_start_is_what_it_says(maker: Maker) -> None:
    """Numbers that nobody told are None."""
    maker.launched("7", 0)
    (start,) = status_of(maker).starts
    assert isinstance(start, Start)
    assert (start.number, start.began, start.first_step, start.lost_steps, start.down_seconds) == (None,) * 5
