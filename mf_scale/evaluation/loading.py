"""A trained model from a run directory or one checkpoint folder, ready for inference; DeepSpeed is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mf_scale.config.consent import refuse_unasked_code
from mf_scale.config.load import is_overridden, load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary, validate
from mf_scale.fragments import checkpoint_weights
from mf_scale.models.build import build_model
from mf_scale.models.class_embeddings import exchanged_rows
from mf_scale.models.logit_adjustment import adjust_logits
from mf_scale.models.text_head import CLASS_ROWS
from mf_scale.models.weights import load_tensors
from mf_scale.rundir import CONFIG, STATE, VOCABULARY, read_json, resolve_checkpoint
from mf_scale.vocabulary import Vocabulary

_EMBEDDINGS = "model.class_embeddings"


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

    Class embeddings are the checkpoint's own, unless the overrides name a file: then its vocabulary is the model's. The
    weights are those that `eval.weights` asks for: raw ones or their moving average.
    """
    config = load_config(folder / CONFIG, overrides)
    validate(config)
    refuse_unasked_code(config, overrides, folder / CONFIG)
    vocabulary, where = Vocabulary.load(folder / VOCABULARY), str(folder / VOCABULARY)
    weights = checkpoint_weights(folder, config.eval.weights)
    if config.model.class_embeddings is not None and is_overridden(overrides, _EMBEDDINGS):
        vocabulary, rows = exchanged_rows(config.model.class_embeddings, vocabulary, weights.get(CLASS_ROWS))
        weights[CLASS_ROWS], where = rows, config.model.class_embeddings
        config = replace(config, model=replace(config.model, num_classes=None))
    classes = check_vocabulary(config, vocabulary, where=where)
    bare = replace(config.model, backbone=replace(config.model.backbone, weights="none"))
    model = build_model(bare, classes, seed=config.seed, class_rows=weights.get(CLASS_ROWS))
    load_tensors(model, weights, where=folder)
    adjust_logits(model, vocabulary, config.eval.logit_adjustment, where=where)
    step = int(read_json(folder / STATE).get("step", 0))
    return LoadedModel(model.to(device).eval(), config, vocabulary, step, run_dir, folder)
