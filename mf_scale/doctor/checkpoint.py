"""Checkpoints: what a start with this configuration would do, and whether the saved weights fit it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mf_scale.config.schema import Config
from mf_scale.data.index import Index
from mf_scale.data.sources import continue_order
from mf_scale.distributed.env import job_start
from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding, refused
from mf_scale.doctor.sizes import ModelSize
from mf_scale.errors import FaultError, UserError
from mf_scale.fragments import weight_shapes
from mf_scale.models.backbone_weights import weights_file
from mf_scale.models.weights import WeightsReport, compare
from mf_scale.rundir import (
    MANIFEST,
    STATE,
    RunDir,
    checkpoint_damage,
    committed_checkpoints,
    read_json,
    resolve_checkpoint,
)
from mf_scale.training.class_rows import CLASS_HEADS, lent_classes, of_classes
from mf_scale.training.fence import LOCK, read_holder
from mf_scale.training.preflight import check_same_vocabulary, refuse_foreign
from mf_scale.training.slurm_jobs import still_known
from mf_scale.training.state import TrainState

CHECK, START = "checkpoint", "start"
_DIGEST_BYTES = 256 * 2**20
"""Checkpoints up to this size are checked by digest here too; a start checks every one."""
_TENSORS_SHOWN = 3


@dataclass(frozen=True)
class Held:
    """What the run directory holds."""

    checkpoints: int
    bytes: int


def held_by(run: RunDir) -> Held:
    """The committed checkpoints and their bytes, by their manifests."""
    folders = committed_checkpoints(run)
    return Held(len(folders), sum(_bytes(folder) for folder in folders))


def judge_checkpoint(
    config: Config, run: RunDir, ranks: int, sources: Sequence[Index], model: ModelSize | None
) -> list[Finding]:
    """What a start would do: begin, take weights from elsewhere, or go on; and whether it could.

    `sources` may be empty and `model` None where they could not be opened or built.
    """
    found = _in_use(run)
    try:
        refuse_foreign(run)
    except UserError as error:
        return [*found, refused(CHECK, error)]
    folders = committed_checkpoints(run)
    damaged: list[str] = []
    for folder in folders:
        damage = checkpoint_damage(folder, digests=_bytes(folder) <= _DIGEST_BYTES)
        if damage is None:
            return [*found, *_damaged(damaged), *_resume(config, folder, ranks, sources, model)]
        damaged.append(f"{folder.name}: {damage}")
    if damaged:
        remedy = "Restore one, or start a new run_dir (train.init_from can take weights from elsewhere)."
        return [*found, Finding(CHECK, PROBLEM, f"no checkpoint of this run is sound: {'; '.join(damaged)}", remedy)]
    if config.train.init_from:
        return [*found, *_from_elsewhere(config, sources, model)]
    return [*found, *_from_nothing(config)]


def _damaged(damaged: Sequence[str]) -> list[Finding]:
    if not damaged:
        return []
    what = f"{damaged[0]}; a start goes back to the one before it"
    return [Finding(CHECK, WARNING, what, "Look at the disk: a committed checkpoint does not change by itself.")]


def _resume(
    config: Config, folder: Path, ranks: int, sources: Sequence[Index], model: ModelSize | None
) -> list[Finding]:
    found = []
    other = f"start a new run_dir with train.init_from={folder.parent.parent} --reinit-head."
    if sources:
        found += _of(lambda: check_same_vocabulary(folder, sources[0].vocabulary, other))
    if model is not None:
        found += _fits(model, folder, kind=config.model.kind, but_head=False)
    if found:
        return found
    state = TrainState.from_dict(read_json(folder / STATE))
    facts, manifest = read_json(folder / STATE), read_json(folder / MANIFEST)
    before, steps = int(manifest.get("world", 0)), config.train.steps
    details = {"step": state.step, "steps": steps, "world_before": before, "checkpoint": str(folder)}
    if state.step >= steps:
        what = f"{folder.name} is at step {state.step:,} of train.steps = {steps:,}: a start would end at once"
        return [Finding(START, WARNING, what, "Raise train.steps, or take another run_dir.", details=details)]
    text = f"goes on at step {state.step:,} of {steps:,}"
    if before and before != ranks:
        text += f", written by {before} ranks and read by {ranks}"
    stage = facts.get("zero_stage")
    if stage is not None and stage != config.zero.stage:
        text += f", ZeRO {stage} to {config.zero.stage}"
    if sources:
        _, change = continue_order(config, sources, state.data, state.step)
        if change is not None:
            # Legal, and rarely meant.
            return [Finding(START, WARNING, f"{text}. {change}", "Nothing, if it is meant so.", details=details)]
    fits = f"; {len(model.tensors):,} tensors and the vocabulary fit" if model is not None and sources else ""
    return [Finding(START, OK, text + fits, details=details)]


def _from_nothing(config: Config) -> list[Finding]:
    """A run with the weights of its backbone's pretraining; UserError where the package that has them is not there."""
    weights = config.model.backbone.weights
    if config.model.pixel_level.builder is not None:
        return [Finding(START, OK, "begins at step 0 with what model.pixel_level.builder makes")]
    if weights in ("none", "timm"):
        told = "all weights random" if weights == "none" else "backbone weights by timm, from its cache or the network"
        return [Finding(START, OK, f"begins at step 0, {told}")]
    file = weights_file(weights)
    if not file.is_file():
        what = f"the backbone's weights are not there: {file}"
        return [Finding(START, PROBLEM, what, "Check model.backbone.weights.")]
    return [Finding(START, OK, f"begins at step 0, backbone weights of {file.name}")]


def _from_elsewhere(config: Config, sources: Sequence[Index], model: ModelSize | None) -> list[Finding]:
    anew = config.train.reinit_head
    folder = resolve_checkpoint(str(config.train.init_from))[1]
    found, lent = list[Finding](), None
    if sources and not anew:
        try:
            lent = lent_classes(config, folder, sources[0].vocabulary)
        except UserError as error:
            found.append(refused(CHECK, error))
    if model is not None:
        left_out = anew or lent is not None or config.model.class_embeddings is not None
        found += _fits(model, folder, kind=config.model.kind, but_head=left_out, whole_head=anew)
    head = " without the class head" if anew else ""
    if lent is not None:
        head = f", {len(lent.lenders) - len(lent.anew):,} of {len(lent.lenders):,} classes with their rows"
    return found or [Finding(START, OK, f"begins at step 0 with the weights of {folder}{head}")]


def _of(check: object) -> list[Finding]:
    try:
        check()  # type: ignore[operator]
    except UserError as error:
        return [refused(CHECK, error)]
    return []


def _fits(model: ModelSize, folder: Path, *, kind: str, but_head: bool, whole_head: bool = False) -> list[Finding]:
    """Names and shapes of the saved weights against the model's; headers alone are read."""
    given = {name: torch.empty(shape, device="meta") for name, shape in weight_shapes(folder).items()}
    own = model.tensors
    if but_head:
        names = of_classes({**own, **given}, kind)
        own, given = (
            {n: t for n, t in of.items() if n not in names and not (whole_head and n.startswith(CLASS_HEADS[kind]))}
            for of in (own, given)
        )
    report = compare(own, given)
    if report.complete:
        return []
    return [
        Finding(
            CHECK,
            PROBLEM,
            f"the weights of {folder} do not fit the model: {_unfit(report)}",
            "Train it with the configuration that it was trained with (config.yaml beside it), or start a new run_dir.",
            details={"missing": len(report.missing), "unexpected": len(report.unexpected)},
        )
    ]


def _unfit(report: WeightsReport) -> str:
    parts = []
    if report.mismatched:
        shapes = [f"{name} is {list(saved)} there and {list(own)} here" for name, saved, own in report.mismatched]
        parts.append(f"{len(shapes)} tensors of another shape ({'; '.join(shapes[:_TENSORS_SHOWN])})")
    for what, names in (("missing", report.missing), ("not known here", report.unexpected)):
        if names:
            parts.append(f"{len(names)} {what} ({', '.join(names[:_TENSORS_SHOWN])})")
    return ", ".join(parts)


def _in_use(run: RunDir) -> list[Finding]:
    """Whether somebody trains there now: its lock is held on, and not by an older start of this job."""
    try:
        handle = os.open(run.path / LOCK, os.O_RDONLY)
    except OSError:
        return []
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, mine = read_holder(os.pread(handle, 400, 0).decode(errors="replace")), job_start()
            job = holder.job if holder is not None else None
            # A start takes over from an older one of its job, and from a job that SLURM no longer runs.
            if job is not None and ((mine is not None and job == mine.job) or not still_known(job)):
                return []
            who = f" ({holder})" if holder is not None else ""
            remedy = "Wait for it, stop it, or choose another run_dir."
            return [Finding(CHECK, PROBLEM, f"another process is training in this run directory{who}", remedy)]
        except OSError:
            return []  # a file system without locks
    finally:
        os.close(handle)
    return []


def _bytes(folder: Path) -> int:
    with suppress(UserError, KeyError, TypeError, ValueError, AttributeError, FaultError):
        return sum(int(entry["size"]) for entry in read_json(folder / MANIFEST)["files"].values())
    return 0
