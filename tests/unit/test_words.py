"""The last word of a start that an error ends: what is wrong, short, with its exit code."""

from __future__ import annotations

import pytest

from mf_scale.distributed.env import World
from mf_scale.errors import FaultError, GuardError, UserError
from mf_scale.training.words import last_word, start_facts
from tests.unit.histories import Maker


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (UserError("the file is gone", where="x", remedy="Find it."), "the file is gone", 2),
        (GuardError("3 steps had no update"), "3 steps had no update", 3),
        (FaultError("storage failed"), "storage failed", 75),
        (RuntimeError("out of memory\nmore\nlines"), "RuntimeError: out of memory", 1),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:123"),
            "the connection to another rank broke, which had ended or hung",
            1,
        ),
        (ValueError(), "ValueError", 1),
        (KeyboardInterrupt(), "KeyboardInterrupt", 130),
    ],
)
def test_the_last_word(error: BaseException, reason: str, code: int) -> None:
    assert last_word(error) == {"reason": reason, "exit_code": code}


def test_it_is_short() -> None:
    assert len(last_word(RuntimeError("x" * 10_000))["reason"]) == 300


def test_a_start_tells_where_it_is_and_what_came_before(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker(tmp_path_factory.mktemp("words") / "run")
    maker.begun(0)
    maker.steps(5)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    facts = start_facts(maker.run, World(), start=2, step=4)
    assert (facts["job"], facts["restart"], facts["hosts"]) == ("12", 3, ["node7"])
    assert (facts["after"]["reached"], facts["after"]["lost_steps"]) == (5, 1)
    monkeypatch.delenv("SLURM_JOB_ID")
    (maker.run.path / "launches.jsonl").mkdir()  # cannot be read: not a reason not to train
    facts = start_facts(maker.run, World(), start=2, step=4)
    assert (facts["job"], facts["restart"], facts["after"]) == (None, None, None)
