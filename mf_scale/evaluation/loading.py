"""A trained model from a run directory or one checkpoint folder, ready for inference; DeepSpeed is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mf_scale.config.consent import refuse_unasked_code
from mf_scale.config.load import load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary, validate
from mf_scale.fragments import checkpoint_weights
from mf_scale.models.build import build_model
from mf_scale.models.weights import load_tensors
from mf_scale.rundir import CONFIG, STATE, VOCABULARY, read_json, resolve_checkpoint
from mf_scale.vocabulary import Vocabulary


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory."""

    model: nn.Module
    """In eval mode, fp32, on the wanted device."""
    config: Config
    """The checkpoint's configuration with the overrides."""
    vocabulary: Vocabulary
    step: int
    """Steps it was trained."""
    run_dir: Path | None
    """None for a checkpoint folder outside a run."""
    checkpoint: Path


def load_model(path: str, overrides: Sequence[str], device: torch.device) -> LoadedModel:
    """Load the newest sound checkpoint of a run, or the one given; raises UserError for whatever does not fit."""
    return load_checkpoint(*resolve_checkpoint(path), overrides, device)


def load_checkpoint(run_dir: Path | None, folder: Path, overrides: Sequence[str], device: torch.device) -> LoadedModel:
    """Load a checkpoint that was verified; raises UserError for whatever does not fit.

    The weights are those that `eval.weights` asks for: raw ones or their moving average.
    """
    config = load_config(folder / CONFIG, overrides)
    validate(config)
    refuse_unasked_code(config, overrides, folder / CONFIG)
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    classes = check_vocabulary(config, vocabulary, where=str(folder / VOCABULARY))
    bare = replace(config.model, backbone=replace(config.model.backbone, weights="none"))
    model = build_model(bare, classes, seed=config.seed)
    load_tensors(model, checkpoint_weights(folder, config.eval.weights), where=folder)
    step = int(read_json(folder / STATE).get("step", 0))
    return LoadedModel(model.to(device).eval(), config, vocabulary, step, run_dir, folder)
