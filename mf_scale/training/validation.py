"""The validation loss: the training loss on fixed samples of the validation source, each exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from mf_scale.config.schema import Config
from mf_scale.config.validate import BatchPlan
from mf_scale.data.batch import Batch
from mf_scale.data.collate import cut
from mf_scale.data.index import Index
from mf_scale.data.loader import loss_batches
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.losses.terms import StepLoss
from mf_scale.training.saver import Saver
from mf_scale.training.transfer import Transfer

_SEED = 0
"""Of what is random in a loss: its sampled points are then a function of the sample's key alone."""


def validation_loss(
    engine: Engine,
    criterion: StepLoss,
    index: Index,
    config: Config,
    plan: BatchPlan,
    world: World,
    transfer: Transfer,
    saver: Saver,
    stop_wanted: Callable[[], bool],
) -> dict[str, float] | None:
    """Loss terms over the first `eval.loss_samples` samples, or None where a stop was agreed on in between.

    Sums are taken with normalisers of 1 and divided at the end, so the value depends neither on ranks nor
    on batches, nor by sampled points on the run's seed or on where it was resumed. A checkpoint that is written
    meanwhile is committed. Raises the UserError of any rank that cannot read its samples, on all of them.
    """
    sums = np.zeros(len(criterion.names) + criterion.summed + 1)
    engine.share_buffers()
    engine.train(False)
    try:
        with torch.no_grad():
            batches = _batches(index, config, plan, world)
            while True:
                batch, failure = _next(batches)
                mine = np.array([stop_wanted(), failure is not None, saver.written()], dtype=np.int64)
                stops, failures, written = comm.sum_array(mine).tolist()
                if written == world.size:
                    saver.commit()
                if failures:
                    saver.finish()
                    comm.together(partial(_raise, failure))
                if stops:
                    return None
                if batch is None:
                    break
                sums += _batch_sums(engine, criterion, batch, transfer)
    finally:
        engine.train(True)
    *values, bad = comm.sum_array(sums).tolist()
    terms = len(criterion.names)
    denominators = criterion.denominators(values[terms:])
    by_term = {name: value / denominators[name] for name, value in zip(criterion.names, values[:terms], strict=True)}
    return {
        "loss": sum(by_term.values()),
        **{f"loss_{name}": value for name, value in by_term.items()},
        "undecodable": int(bad),
    }


def _next(batches: Iterator[Batch]) -> tuple[Batch | None, UserError | None]:
    """The next batch, None behind the last one (which is the last on every rank); why this rank has none, if so."""
    try:
        return next(batches, None), None
    except UserError as error:
        return None, error


def _raise(failure: UserError | None) -> None:
    if failure is not None:
        raise failure


def _batches(index: Index, config: Config, plan: BatchPlan, world: World) -> Iterator[Batch]:
    count = min(config.eval.loss_samples, index.samples)
    return loss_batches(index, config.data, count=count, batch=plan.micro_batch, rank=world.rank, world=world.size)


def _batch_sums(engine: Engine, criterion: StepLoss, batch: Batch, transfer: Transfer) -> np.ndarray:
    """Sums of the terms and of their normalisers, and the samples that do not decode.

    Places without a sample (key "", at the end of the batch) count nothing.
    """
    real = sum(key != "" for key in batch.keys)
    kept = cut(batch, 0, max(real, 1))
    there = next(transfer.micro_batches(batch, len(batch)))
    micro = cut(there, 0, len(kept))
    # All places go through the model: a compiled one is made for one shape.
    prediction = engine.forward(there.images).first(len(kept.keys))
    torch.manual_seed(_SEED)  # training seeds every micro-batch itself, so nothing is lost
    losses = criterion(prediction, micro, criterion.normalisers([1.0] * criterion.summed))
    bad = sum(event["event"] == "quarantine" for event in batch.events)
    if not real:
        return np.array([*[0.0] * (len(criterion.names) + criterion.summed), bad])
    return np.array([*(float(losses.terms[name]) for name in criterion.names), *criterion.totals(kept), bad])
