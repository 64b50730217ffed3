"""Laws of lost work: whatever happens to a run, steps lost and steps kept are the steps that were taken."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mf_scale.tracking.status import run_status
from tests.unit.histories import Maker

# Steps that a start takes, after which of them it saves, whether a job script was there, how far it goes back if its
# newest checkpoints turn out damaged, how often it logs.
STARTS = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.sets(st.integers(1, 9), max_size=4),
        st.booleans(),
        st.integers(0, 2),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=6,
)


@given(STARTS)
def test_lost_and_kept_are_what_was_taken(starts: list[tuple[int, set[int], bool, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(Path(folder) / "run")
        saved, resumed_at, taken, seconds_taken, wanted = [0], 0, 0, 0.0, []
        for number, (steps, saves, script, back, every) in enumerate(starts):
            for _ in range(back if number else 0):
                if len(saved) > 1:
                    saved.pop()
            if number:
                wanted.append(maker.step - saved[-1])
            resumed_at = saved[-1]
            if script:
                maker.launched("7", number, "node1")
            maker.begun(resumed_at, **({"job": "7", "restart": number} if script else {}))
            for step in range(resumed_at + 1, resumed_at + steps + 1):
                maker.steps(step, every=every)
                if step - resumed_at in saves and not maker.run.checkpoint(step).exists():
                    maker.saved()
                    saved.append(step)
            taken, seconds_taken = taken + steps, seconds_taken + 2.0 * steps
            maker.passed(10)
        status = run_status(maker.run, now=maker.time)
        assert [one.lost_steps for one in status.starts] == [*wanted, None]
        assert status.lost_steps == taken - maker.step
        assert status.step == maker.step
        assert status.lost_images == 8 * status.lost_steps
        assert status.lost_seconds is None or abs(status.lost_seconds - (seconds_taken - 2.0 * maker.step)) < 0.01
        if all(not back for _, _, _, back, _ in starts):
            assert status.lost_seconds is not None
