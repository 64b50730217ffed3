"""Rank of test_loop.py: takes steps of a real session as the trainer does and tells where the host waited.

Arguments: a file for the result, then overrides of the configuration.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from mf_scale.config.load import load_config
from mf_scale.data.batch import Batch
from mf_scale.data.loader import train_steps
from mf_scale.distributed import comm
from mf_scale.distributed.env import world_from_environment
from mf_scale.training.ledger import Ledger
from mf_scale.training.recorder import open_recorder
from mf_scale.training.schedule import lr_factor
from mf_scale.training.session import Session, open_session
from mf_scale.training.step import agree, train_step
from tests.gpu.waits import recorded

WARM, WATCHED = 2, 4
"""Steps that compile and probe, and steps that are watched after them; as many again are profiled."""
_RUNTIME = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def main() -> None:
    target, overrides = Path(sys.argv[1]), sys.argv[2:]
    world = world_from_environment()
    with comm.process_group(world, timeout=60) as device:
        config = load_config(None, overrides)
        with open_session(config, world, device) as session, open_recorder(session) as recorder:
            result = watch(session, Ledger(session, recorder))
    target.write_text(json.dumps(result))


def watch(session: Session, ledger: Ledger) -> dict[str, Any]:
    """Waits of the watched steps, and the calls of CUDA's runtime that wait in those profiled."""
    state = session.state
    stream = train_steps(
        session.index,
        state.data,
        session.config.data,
        seed=session.config.seed,
        rank=session.world.rank,
        world=session.world.size,
        step=0,
    )
    with closing(stream):
        for _ in range(WARM):
            take_step(session, ledger, next(stream)[1])
        batches = [next(stream)[1] for _ in range(2 * WATCHED)]
        with recorded() as found:
            for batch in batches[:WATCHED]:
                take_step(session, ledger, batch)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as record:
            for batch in batches[WATCHED:]:
                take_step(session, ledger, batch)
        ledger.settle()
    events = [event.name for event in record.events() or ()]
    return {
        "stacks": found,
        "micro_batches": WATCHED * session.plan.accumulation,
        "steps": WATCHED,
        "runtime": {name: events.count(name) for name in _RUNTIME},
        "updates": state.updates,
    }


def take_step(session: Session, ledger: Ledger, batch: Batch) -> None:
    """What the trainer does in one step of an undisturbed run."""
    session.transfer.start(batch, session.plan.micro_batch)
    agreement = agree(
        batch,
        session.criterion,
        stop=False,
        save=False,
        written=False,
        failed=False,
        loss=ledger.loss_share(),
        world=session.world,
    )
    ledger.judge(agreement.loss)

    def factor() -> float:
        ledger.settle()
        return lr_factor(session.config.schedule, session.state.updates, session.config.train.steps)

    result = train_step(
        session.engine,
        session.criterion,
        batch,
        agreement,
        transfer=session.transfer,
        plan=session.plan,
        world=session.world,
        seed=session.config.seed,
        step=session.state.step,
        lr_factor=factor,
    )
    ledger.book(result, 0.0)
    session.state.step += 1


main()
