"""Checkpoint, task, classes and input are checked before anything is written or, with --overwrite, removed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from mf_scale.errors import UserError
from mf_scale.evaluation.loading import LoadedModel, load_checkpoint
from mf_scale.evaluation.prediction.claims import refuse_held
from mf_scale.evaluation.prediction.commits import books_of
from mf_scale.evaluation.prediction.files import FileSource
from mf_scale.evaluation.prediction.find import Look, categories
from mf_scale.evaluation.prediction.finish import thresholds_of
from mf_scale.evaluation.prediction.input import open_input
from mf_scale.evaluation.prediction.plan import (
    identity_of,
    planned_checkpoint,
    read_plan,
    refuse_other,
    remove_prediction,
    write_plan,
)
from mf_scale.evaluation.prediction.shards import IndexSource
from mf_scale.evaluation.prediction.words import Options, Share, Source
from mf_scale.rundir import resolve_checkpoint


@dataclass(frozen=True)
class Asked:
    """A prediction as it is asked for."""

    folder: Path
    run: str
    options: Options
    source: Source
    identity: dict[str, Any]
    plan: dict[str, Any] | None
    """Of the same prediction, begun before."""
    overwrite: bool


@dataclass(frozen=True)
class Work:
    """A prediction ready to go on."""

    folder: Path
    plan: dict[str, Any]
    source: Source
    loaded: LoadedModel
    look: Look
    parts: list[int]
    """Of this process, and not committed."""


def look(inputs: Sequence[str], run: str, out: str, options: Options, overwrite: bool) -> Asked:
    """Open the input and look at the folder; UserError where one is nothing, or the other holds something else."""
    folder = Path(out)
    source, layout = open_input(inputs, options)
    identity = identity_of(run, source, layout, options)
    return Asked(folder, run, options, source, identity, refuse_other(folder, identity, source, overwrite), overwrite)


def prepare(asked: Asked, mine: list[int]) -> Work:
    """Load the model and write the plan; whatever can be refused is refused before anything is written or removed."""
    if asked.plan is not None:
        loaded, drawn = _checked(asked, None, planned_checkpoint(asked.plan), _device())
        return Work(asked.folder, asked.plan, asked.source, loaded, drawn, mine)
    run_dir, checkpoint = resolve_checkpoint(asked.run)
    loaded, drawn = _checked(asked, run_dir, checkpoint, _device())
    limits = thresholds_of(asked.options.task, loaded.config.eval)
    _remove(asked)
    told = {"categories": categories(loaded.vocabulary), "limits": limits}
    plan = write_plan(asked.folder, asked.identity, checkpoint, told)
    if plan["checkpoint"] != str(checkpoint):  # another process was faster, and the run went on meanwhile
        loaded = load_checkpoint(None, planned_checkpoint(plan), asked.options.overrides, _device())
    return Work(asked.folder, plan, asked.source, loaded, drawn, mine)


def remove_checked(inputs: Sequence[str], run: str, out: str, options: Options) -> None:
    """What --overwrite removes, for processes that are to be started: behind the checks that each of them makes."""
    if read_plan(Path(out)) is None:
        return
    asked = look(inputs, run, out, options, overwrite=True)
    _checked(asked, *resolve_checkpoint(run), torch.device("cpu"))
    _remove(asked)


def refuse_to_overwrite(share: Share) -> None:
    """UserError where several processes are told to remove what is there: each would remove what others have done."""
    if not share.alone:
        raise UserError(
            "of several processes that know nothing of each other none may remove what is there",
            where="--overwrite",
            remedy="Remove the folder before they start.",
        )


def _remove(asked: Asked) -> None:
    if asked.overwrite and (before := read_plan(asked.folder)) is not None:
        refuse_held(books_of(asked.folder, before["layout"]))
        remove_prediction(asked.folder)


def _checked(asked: Asked, run_dir: Path | None, checkpoint: Path, device: torch.device) -> tuple[LoadedModel, Look]:
    """The model and how its results are drawn; UserError for what can be refused without a look at every image."""
    loaded = load_checkpoint(run_dir, checkpoint, asked.options.overrides, device)
    drawn = Look(loaded.vocabulary, bool(asked.identity["overlay"]), _shown(loaded, asked.options))
    _refuse_task(loaded, asked.options.task)
    if asked.plan is None:
        _refuse_only(asked.source, loaded)
        if isinstance(asked.source, IndexSource):
            asked.source.check()
    return loaded, drawn


def _refuse_task(loaded: LoadedModel, task: str) -> None:
    where = str(loaded.checkpoint)
    if loaded.config.model.kind.startswith("per_pixel") and task != "semantic":
        raise UserError(
            "a per-pixel model gives every pixel a class and knows no segments",
            where=where,
            remedy="Use --task semantic.",
        )
    if task == "instance" and not any(loaded.vocabulary.things):
        raise UserError(
            f"vocabulary {loaded.vocabulary.name!r} has no thing class, so there are no instances to find",
            where=where,
            remedy="Use --task semantic or panoptic.",
        )


def _refuse_only(source: Source, loaded: LoadedModel) -> None:
    """Where one image is all there is, what is wrong with it is the answer, and no folder is made."""
    if source.total == 1 and isinstance(source, FileSource):
        fault = source.load(0, loaded.config.data.max_pixels).fault
        if fault is not None:
            raise fault


def _shown(loaded: LoadedModel, options: Options) -> frozenset[int]:
    """The labels of the classes that a person wants to see."""
    names = loaded.vocabulary.names
    for name in options.classes:
        if name not in names:
            close = get_close_matches(name, names, 2)
            raise UserError(
                f"there is no class {name!r}",
                where=f"vocabulary {loaded.vocabulary.name!r}",
                remedy=f"Did you mean {' or '.join(close)}?" if close else "The run's vocabulary.json lists them all.",
            )
    return frozenset(names.index(name) for name in options.classes)


def _device() -> torch.device:
    """The GPU of this rank; several ranks may share one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", local % torch.cuda.device_count())
