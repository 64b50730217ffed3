"""What is told of the samples that a step takes: the quarantined ones, the keys, what a rank has in hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mf_scale.data.batch import Batch
from mf_scale.distributed import comm
from mf_scale.errors import GuardError
from mf_scale.training.position import DataOfRun, samples_of
from mf_scale.training.recorder import Recorder
from mf_scale.training.saver import Saver
from mf_scale.training.session import Session
from mf_scale.training.watchdog import EVALUATION


def record_samples(session: Session, recorder: Recorder, saver: Saver, batch: Batch, quarantined: int) -> None:
    """Write the step's `quarantined` samples (of all ranks) and, where wanted, its keys; GuardError on too many."""
    config, state = session.config, session.state
    if quarantined:
        state.quarantined += quarantined
        for event in _flat(comm.gather_objects([e for e in batch.events if e.get("event") == "quarantine"])):
            recorder.event("quarantine", **{name: value for name, value in event.items() if name != "event"})
            where = f"{event.get('shard')}" + (f" of {event.get('source')}" if len(session.sources) > 1 else "")
            recorder.note(f"quarantined {event.get('key')} in {where}: {event.get('reason')}")
        of = max(state.samples, session.samples)
        if state.quarantined / of > config.data.max_bad_fraction:
            what = f"samples could not be decoded: {state.quarantined}, which is {state.quarantined / of:.2%} of {of:,}"
            named = ", ".join(index.source for index in session.sources)
            where = f"{named}, data.max_bad_fraction = {config.data.max_bad_fraction}"
            saver.finish()
            remedy = "Run `python -m data_tools verify` on the source; metrics.jsonl names every sample."
            raise comm.agreed(GuardError(what, where=where, remedy=remedy))
    if config.data.log_keys:
        keys = _flat(comm.gather_objects(batch.keys))
        recorder.event("keys", keys=keys)


def _flat(parts: list[list[Any]] | None) -> list[Any]:
    """Ranks' lists as one; empty on the ranks that gather nothing."""
    return [item for part in parts or () for item in part]


def samples_in_hand(session: Session) -> Callable[[str, int, int], list[str]]:
    """What computes this rank's samples of a step (from 1), a line each with its shard, when somebody wants to know.

    In an evaluation it is the image of the turn; behind the last one the numbers are put together.
    """
    data, world = DataOfRun(session.config, session.sources, session.state.data, []), session.world
    validation, wanted = session.validation, session.config.eval.metrics_samples

    def samples(phase: str, step: int, turn: int) -> list[str]:  # keeps nothing of the session's memory on the device
        if phase == EVALUATION and validation is not None:
            if turn * world.size >= min(wanted or validation.samples, validation.samples):
                return []
            sample = validation.sample((turn * world.size + world.rank) % validation.samples)
            return [f"{sample.key}  {validation.source}/{sample.shard}"]
        own = [sample for sample in samples_of(data, step) if sample.lane % world.size == world.rank]
        return [f"{sample.key}  {sample.source}/{sample.shard}" for sample in own]

    return samples
