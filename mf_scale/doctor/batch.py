"""Batch arithmetic: the global batch over ranks, accumulation and sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from mf_scale.config.schema import Config
from mf_scale.config.validate import plan_batch, plan_note
from mf_scale.data.index import Index
from mf_scale.data.sources import share_batch, training_sources
from mf_scale.doctor.finding import OK, WARNING, Finding

CHECK = "batch"


def judge_batch(config: Config, ranks: int, sources: Sequence[Index] = ()) -> list[Finding]:
    """One line; raises the UserError of training where the batch cannot be cut. `sources` may be unknown."""
    plan = plan_batch(config, ranks)
    total, steps = config.train.global_batch, config.train.steps
    text = f"{total} = {plan.micro_batch} x {plan.accumulation} accumulated x {ranks} rank{'s' * (ranks > 1)}"
    details = asdict(plan)
    if sources:
        counts = share_batch([source.weight for source in training_sources(config.data)], total)
        samples = [index.samples for index in sources]
        epochs = [steps * count / number for count, number in zip(counts, samples, strict=True)]
        text += f", {steps:,} steps are {_range(epochs)} epochs of {sum(samples):,} images"
    note = plan_note(config, plan)
    if note is not None:
        fitting = [size for size in range(1, total // ranks + 1) if total // ranks % size == 0]
        several = " or ".join(map(str, fitting[-6:]))
        remedy = f"What divides it is taken whole: train.micro_batch={several}."
        return [Finding(CHECK, WARNING, note, remedy, details=details)]
    return [Finding(CHECK, OK, text, details=details)]


def _range(epochs: Sequence[float]) -> str:
    low, high = min(epochs), max(epochs)
    return f"{low:,.1f}" if high - low < 0.05 * high else f"{low:,.1f} to {high:,.1f}"
