"""Guards: steps without an update are counted, told and end a dead run; a loss that jumps takes the run back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mf_scale.config.train_schema import GuardConfig
from mf_scale.data.order import Segment, Stream
from mf_scale.data.state import DataState
from mf_scale.errors import EXIT_GUARD, GuardError
from mf_scale.rundir import FORMAT, MANIFEST, WEIGHTS, RunDir, file_digest
from mf_scale.tracking.metrics import MetricsLog
from mf_scale.training.guard import DeadSteps, skip_report, skip_sentence, sound_checkpoint_before, stop_dead_run
from mf_scale.training.spike import SpikeGuard, plan_rollback
from mf_scale.training.state import TrainState

NAN = float("nan")


def observed(dead: DeadSteps, outcomes: str, first: int = 1) -> list[str | None]:
    """Answers to a row of steps: x had no update."""
    return [dead.observe(step, mark != "x") for step, mark in enumerate(outcomes, start=first)]


def test_so_many_in_a_row_end_the_run_and_one_update_between_does_not():
    config = GuardConfig(skipped_in_a_row=3, skipped_share=0.0, window=10)
    dead = DeadSteps(config, [], 0)
    *before, last = observed(dead, "xx.xx.x.xxx")
    assert before == [None] * 10
    assert last == "3 steps in a row had no update" and dead.in_a_row == 3


def test_a_share_of_the_window_ends_the_run_but_one_of_one_is_not_all():
    config = GuardConfig(skipped_in_a_row=99, skipped_share=0.3, window=10)
    dead = DeadSteps(config, [], 0)
    answers = observed(dead, "x.x.x." + "." * 8 + "x.x.x.x")
    assert answers[:20] == [None] * 20, "three of ten are not above 0.3, and the first ones fell out of the window"
    assert answers[20] == "4 of the last 10 steps had no update"
    off = DeadSteps(GuardConfig(skipped_in_a_row=99, skipped_share=0.0, window=10), [], 0)
    assert observed(off, "x." * 20) == [None] * 40


def test_the_defaults_bear_fifty_of_five_hundred():
    dead = DeadSteps(GuardConfig(), [], 0)
    answers = observed(dead, "x........" * 51)
    assert answers.index("51 of the last 500 steps had no update") == 50 * 9


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_resumed_run_counts_on(cut):
    """Whatever was observed before the checkpoint counts as if nothing had happened, through the saved state."""
    config, outcomes = GuardConfig(skipped_in_a_row=4, skipped_share=0.4, window=8), ".x.xx..xxxxx"
    whole = DeadSteps(config, [], 0)
    wanted = observed(whole, outcomes)
    state = a_state(step=cut)
    observed(DeadSteps(config, state.skipped, 0), outcomes[:cut])
    saved = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
    resumed = DeadSteps(config, saved.skipped, saved.step)
    assert observed(resumed, outcomes[cut:], cut + 1) == wanted[cut:]
    assert resumed.counted == whole.counted


def test_a_run_that_resumes_after_good_steps_is_in_no_row():
    assert DeadSteps(GuardConfig(), [4, 5], 6).in_a_row == 0
    assert DeadSteps(GuardConfig(), [4, 5], 5).in_a_row == 2


def test_the_list_does_not_grow_beyond_what_counts():
    dead = DeadSteps(GuardConfig(skipped_in_a_row=3, skipped_share=0.9, window=5), [], 0)
    observed(dead, "xx." * 40)
    assert dead.counted == [116, 118, 119]


NAMES, GROUPS = ("class", "dice"), ("backbone", "rest")


def gathered(monkeypatch, *others):
    """Let `gather_objects` bring what other ranks would have brought."""
    whole = "mf_scale.training.guard.comm.gather_objects"
    monkeypatch.setattr(whole, lambda mine: json.loads(json.dumps([mine, *others])))


def test_the_report_names_rank_term_group_and_samples_of_what_was_not_finite(monkeypatch):
    other = [[{"rank": 1, "micro_batch": 0, "terms": [], "keys": ["c"]}], ["rest"]]
    gathered(monkeypatch, other)
    event = skip_report([[0.5, 1.0], [0.5, NAN]], NAMES, [["a"], ["b"]], [float("inf"), 2.0], GROUPS, rank=0)
    assert event == {
        "reason": "loss",
        "ranks": [{"rank": 0, "micro_batch": 1, "terms": ["dice"], "keys": ["b"]}],
        "groups": ["backbone", "rest"],
    }
    said = skip_sentence(9, 2, event)
    assert said == "step 9: the loss was not finite, rank 0: dice (samples b); no update on any rank (2 in a row)"


def test_without_a_bad_loss_the_samples_of_all_ranks_are_named(monkeypatch):
    other = [[{"rank": 1, "micro_batch": 0, "terms": [], "keys": ["c", "d"]}], ["rest"]]
    gathered(monkeypatch, other)
    event = skip_report([[0.5, 1.0]], NAMES, [["a", "b"]], [1.0, NAN], GROUPS, rank=0)
    assert event is not None and event["reason"] == "gradients" and event["groups"] == ["rest"]
    assert [(entry["rank"], entry["keys"]) for entry in event["ranks"]] == [(0, ["a", "b"]), (1, ["c", "d"])]
    assert "gradients in rest were not (samples a, b, c, d)" in skip_sentence(9, 1, event)


def test_a_sentence_stays_short_with_many_ranks_and_samples():
    ranks = [{"rank": r, "micro_batch": 0, "terms": ["dice"], "keys": [f"k{i}" for i in range(20)]} for r in range(50)]
    said = skip_sentence(1, 1, {"reason": "loss", "ranks": ranks, "groups": []})
    assert "k5 and 14 more" in said and "47 micro-batches more" in said and len(said) < 400


def a_run(folder: Path, *steps: int) -> RunDir:
    """A run directory with committed checkpoints of these steps (their weights are empty: nothing in them is read)."""
    run = RunDir(folder)
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / WEIGHTS).write_bytes(b"")
        entry = {"size": 0, "sha256": file_digest(run.checkpoint(step) / WEIGHTS)}
        (run.checkpoint(step) / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": {WEIGHTS: entry}}))
    return run


def test_the_checkpoint_before_is_sound_and_knows_nothing_of_the_step(tmp_path):
    run = a_run(tmp_path, 4, 8, 12)
    (run.checkpoint(8) / MANIFEST).write_text("torn")
    assert sound_checkpoint_before(run, 20) == run.checkpoint(12)
    assert sound_checkpoint_before(run, 12) == run.checkpoint(4)
    assert sound_checkpoint_before(run, 4) is None


def dead_run(run: RunDir, *skipped: int) -> DeadSteps:
    """One that has skipped these steps, and step 1 so long ago that it does not count any more."""
    log = MetricsLog(run.metrics)
    for step in (1, *skipped):
        log.write("skipped", step, in_a_row=1, reason="loss", groups=[], ranks=[{"rank": 1, "keys": [f"key{step}"]}])
    log.close()
    return DeadSteps(GuardConfig(), list(skipped), skipped[-1])


def test_a_dead_run_stops_with_a_report_and_the_checkpoint_from_before(tmp_path):
    run = a_run(tmp_path, 4, 8, 12)
    with pytest.raises(GuardError) as raised:
        stop_dead_run(run, "3 steps in a row had no update", dead_run(run, 2, 10, 11, 12))
    report = json.loads((run.report / "dead-steps-00000012.json").read_text())
    assert report["checkpoint_before"] == "step-00000008" and report["steps_without_update"] == [2, 10, 11, 12]
    assert [event["ranks"][0]["keys"] for event in report["skipped"]] == [["key2"], ["key10"], ["key11"], ["key12"]]
    said = str(raised.value)
    assert raised.value.exit_code == EXIT_GUARD and "\n" not in said
    assert str(run.checkpoint(8)) in said and str(run.report / "dead-steps-00000012.json") in said
    assert f"mf-scale replay {run.path} --step 10" in said


def test_the_oldest_checkpoint_that_the_guard_can_name_is_from_before_all_that_counts(tmp_path):
    run = a_run(tmp_path, 4, 8)
    with pytest.raises(GuardError, match="step-00000004"):
        stop_dead_run(run, "why", dead_run(run, 6, 10))
    fresh = a_run(tmp_path / "fresh")
    with pytest.raises(GuardError, match="no checkpoint from before"):
        stop_dead_run(fresh, "why", dead_run(fresh, 2, 3))


def test_a_report_in_a_place_that_is_taken_does_not_hide_why_the_run_ended(tmp_path):
    run = a_run(tmp_path, 4)
    run.report.write_text("a file where the folder should be")
    with pytest.raises(GuardError, match="its report could not be written"):
        stop_dead_run(run, "why", dead_run(run, 6))


def spikes(guard: SpikeGuard, *losses: float) -> list[bool]:
    return [guard.observe(loss) for loss in losses]


def test_a_spike_is_a_loss_above_so_many_medians_once_there_are_enough():
    guard = SpikeGuard(GuardConfig(spike_factor=2.0, spike_window=3), [])
    assert spikes(guard, 1.0, 9.0, 1.2) == [False] * 3, "three are needed first"
    assert spikes(guard, 2.5, 2.3, 4.7, 4.6) == [True, False, True, False], "medians 1.2, 1.2, 2.3, 2.3"


def test_spikes_do_not_enter_the_median_and_nothing_is_kept_where_the_guard_is_off():
    losses = [1.0, 1.0, 1.0]
    guard = SpikeGuard(GuardConfig(spike_factor=2.0, spike_window=3), losses)
    assert all(spikes(guard, *[5.0] * 10)) and losses == [1.0] * 3
    assert spikes(guard, NAN, float("inf")) == [False, False] and losses == [1.0] * 3, "no update, so no spike"
    off: list[float] = []
    assert not any(spikes(SpikeGuard(GuardConfig(spike_factor=0.0, spike_window=1), off), 1.0, 99.0)) and not off


def test_a_resumed_run_judges_as_the_uninterrupted_one():
    config, losses = GuardConfig(spike_factor=1.5, spike_window=4), [1.0, 1.1, 0.3, 0.9, 1.6, 0.2, 1.3, 1.1, 2.2]
    wanted = spikes(SpikeGuard(config, []), *losses)
    assert any(wanted)
    for cut in range(len(losses)):
        state = a_state()
        begun = spikes(SpikeGuard(config, state.losses), *losses[:cut])
        saved = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
        assert begun + spikes(SpikeGuard(config, saved.losses), *losses[cut:]) == wanted
        assert len(saved.losses) <= 4


def a_state(step: int = 0) -> TrainState:
    data = DataState((Segment(0, (Stream(0, "digest", 40, 40, 4, 0, 8, "blocks", 0.0, 0, 0),)),))
    return TrainState(step=step, updates=0, samples=0, quarantined=0, validated=0, data=data)


def test_a_rollback_leaves_out_the_batches_of_the_spike_and_is_recorded():
    live, config = a_state(step=31), GuardConfig(spike_skip=5, spike_rollbacks=2)
    rollback = plan_rollback(live, config, step=30, to=25, keys=["a"], where="run")
    resumed = a_state(step=25)
    rollback.apply(resumed)
    assert resumed.rollbacks == [{"step": 30, "to": 25, "skipped": 5}] and live.rollbacks == []
    assert resumed.data.at(26) == live.data.at(26)
    left_out = resumed.data.at(27)  # the spike's own batch is 29: 27 to 31 are left out
    assert (left_out.first_step, left_out.streams[0].origin) == (27, 27 - 32)
    saved = TrainState.from_dict(json.loads(json.dumps(resumed.to_dict())))
    assert saved.data == resumed.data and saved.rollbacks == resumed.rollbacks
    again = plan_rollback(saved, config, step=33, to=25, keys=["a"], where="run")
    assert [r["step"] for r in again.rollbacks] == [30, 33] and again.data.at(32).streams[0].origin == -10


def test_a_run_that_went_back_too_often_stops_and_names_steps_and_samples():
    state, config = a_state(), GuardConfig(spike_factor=3.0, spike_rollbacks=2)
    state.rollbacks = [{"step": 30, "to": 25, "skipped": 5}, {"step": 60, "to": 50, "skipped": 5}]
    with pytest.raises(GuardError, match=r"30, 60.*s1, s2") as raised:
        plan_rollback(state, config, step=90, to=75, keys=["s1", "s2"], where="RUN")
    assert "mf-scale replay RUN --step 90" in str(raised.value)
