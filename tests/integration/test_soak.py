"""Long schedules of random faults: `make soak FAULTS=20`."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.integration.program import LARGER, Run, zero

FAULTS = ("kill everyone", "kill rank 0", "stop rank 0")


@pytest.mark.soak
@pytest.mark.integration
@pytest.mark.timeout(7200)
def test_random_faults_lose_nothing(tmp_path: Path, packed: Path, request: pytest.FixtureRequest) -> None:
    faults = request.config.getoption("--faults")
    steps = f"train.steps={6 * faults + 6}"
    reference = Run(tmp_path / "reference", packed, LARGER)
    assert reference.train(steps, timeout=1800).returncode == 0
    run, chance = Run(tmp_path / "faulty", packed, LARGER), random.Random(0)
    for number in range(faults):
        fault = chance.choice(FAULTS)
        layout = [*zero(chance.choice((0, 1, 2, 3))), f"data.workers={chance.choice((0, 1, 2))}"]
        processes = chance.choice((1, 2))
        if processes == 1:
            fault = "stop rank 0" if fault == "kill rank 0" else fault
        step = min(run.last_step() + chance.randint(1, 6), 6 * faults)
        kind = signal.SIGTERM if fault.startswith("stop") else signal.SIGKILL
        code = run.train_until(step, kind, steps, *layout, processes=processes, everyone=fault == "kill everyone")
        print(f"{number:3d} {fault:<14} at step >= {step:<4} {processes} ranks {' '.join(layout)} -> exit {code}")
    assert run.train(steps, timeout=1800).returncode == 0
    keys, wanted = run.series("keys", "keys"), reference.series("keys", "keys")
    assert {s: sorted(k) for s, k in keys.items()} == {s: sorted(k) for s, k in wanted.items()}
    losses, expected = run.series("step", "loss"), reference.series("step", "loss")
    assert list(losses) == list(expected)
    # Layouts add in different orders, and training carries the difference on.
    assert all(abs(losses[s] - expected[s]) < 0.02 * expected[s] for s in expected)
