"""Whose code is run: a builder that only a checkpoint's configuration names is not called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mf_scale.config.load import is_overridden
from mf_scale.config.schema import Config, PixelLevelConfig
from mf_scale.errors import UserError
from mf_scale.rundir import MANIFEST, RunDir

_KEY = "model.pixel_level.builder"


def refuse_unasked_code(config: Config, overrides: Sequence[str], file: Path) -> None:
    """UserError if `config`, read from the `file` of a checkpoint, names a builder that `overrides` do not name."""
    given = config.model.pixel_level
    if given.builder is not None and not is_overridden(overrides, _KEY):
        raise UserError(
            f"this model is built by code that only the checkpoint's own configuration names: it would import and call "
            f"{shown_call(given)}",
            where=str(file),
            remedy=f"If you trust that call, say so on the command line: {_KEY}={given.builder}",
        )


def belongs_to_a_checkpoint(file: Path) -> bool:
    """Whether a configuration file lies in a run directory, a checkpoint or a bundle."""
    run = RunDir(file.parent)
    return (file.parent / MANIFEST).exists() or run.metrics.exists() or run.checkpoints.is_dir()


def shown_call(config: PixelLevelConfig) -> str:
    """The call of the builder as a person reads it."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in config.kwargs.items())
    return f"{config.builder}({arguments})"
