"""A run that goes back: from a loss that jumped to the last checkpoint from before it."""

from __future__ import annotations

from mf_scale.distributed import comm
from mf_scale.rundir import checkpoint_step, committed_checkpoints, disk_errors
from mf_scale.training.guard import sound_checkpoint_before
from mf_scale.training.ledger import Spike
from mf_scale.training.leftovers import ABANDONED, set_aside
from mf_scale.training.recorder import Recorder
from mf_scale.training.session import Session
from mf_scale.training.spike import Rollback, first_left_out, plan_rollback


def turn_back(session: Session, recorder: Recorder, spike: Spike) -> Rollback:
    """What the session that follows takes along; checkpoints that have seen the spike are set aside.

    Raises GuardError where the run has gone back too often. Without a checkpoint from before, it begins anew.
    """
    keys = comm.broadcast_object(_flat(comm.gather_objects(spike.keys)))
    first = first_left_out(session.config.guard, spike.step)
    back_to = comm.on_first_rank(lambda: _step_before(session, first + 1))
    where = str(session.run.path)
    rollback = plan_rollback(session.state, session.config.guard, step=spike.step, to=back_to, keys=keys, where=where)
    comm.on_first_rank(lambda: _set_aside_later(session, back_to))
    left_out = session.config.guard.spike_skip
    recorder.event("rollback", spike=spike.step, to=back_to, skipped=left_out, keys=keys)
    sentence = f"the loss of step {spike.step} jumped: going back to step {back_to}, and on without {left_out} batches"
    recorder.note(sentence)
    recorder.alert("the loss jumped", sentence)
    return rollback


def _step_before(session: Session, step: int) -> int:
    """On rank 0: the step of the checkpoint to go back to; 0 where there is none."""
    before = sound_checkpoint_before(session.run, step)
    return checkpoint_step(before) if before else 0


def _set_aside_later(session: Session, step: int) -> None:
    """On rank 0: no start takes a checkpoint of what is left behind."""
    with disk_errors(session.run.checkpoints):
        later = [folder for folder in committed_checkpoints(session.run) if checkpoint_step(folder) > step]
        set_aside(session.run, session.fence, later, ABANDONED)


def _flat(parts: list[list[str]] | None) -> list[str]:
    return [key for part in parts or () for key in part]
