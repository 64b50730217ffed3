"""The model a run starts with: weights of its checkpoint, of another run, or of its backbone's pretraining."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mf_scale.config.schema import Config, ModelConfig
from mf_scale.errors import UserError
from mf_scale.fragments import checkpoint_weights
from mf_scale.models.build import build_model
from mf_scale.models.class_embeddings import class_rows
from mf_scale.models.text_head import CLASS_ROWS
from mf_scale.models.weights import compare, load_tensors
from mf_scale.rundir import resolve_checkpoint
from mf_scale.training.class_rows import CLASS_HEADS, lend_rows, lent_classes, refuse_other_rows
from mf_scale.vocabulary import Vocabulary


def initial_model(
    config: Config, vocabulary: Vocabulary, checkpoint: Path | None, init_from: Path | None = None
) -> tuple[nn.Module, list[str]]:
    """The model on the CPU with the weights of `checkpoint` (a resumed run's own, raw), `train.init_from` (those that
    eval.weights asks for) or neither.

    `init_from` is the checkpoint that train.init_from names, where that was verified already. Where its vocabulary is
    another, classes that are in both keep their rows of the class head, which the notes list. With train.reinit_head
    the class head of `init_from` is left out and starts anew, which the notes list; a resumed
    run's checkpoint has its own class head and is taken whole. Class embeddings come from their file always. Raises
    UserError for weights that do not fit.
    """
    source = checkpoint or init_from
    if source is None and config.train.init_from:
        source = resolve_checkpoint(config.train.init_from)[1]
    rows = class_rows(config.model.class_embeddings, vocabulary)
    described = _bare(config.model) if source else config.model
    model = build_model(described, len(vocabulary), seed=config.seed, class_rows=rows)
    refuse_uneven_crop(model, config)
    if source is None:
        return model, []
    # A resumed run goes on with what was trained; another run's average is the better start where it has one.
    given = checkpoint_weights(source, "raw" if checkpoint else config.eval.weights)
    if checkpoint is not None:
        refuse_other_rows(model.state_dict(), given, source)
        load_tensors(model, given, where=source)
        return model, []
    if config.train.reinit_head:
        return model, [_load_all_but_class_head(model, given, source, config.model.kind)]
    return model, _load_by_class(model, given, source, config, vocabulary)


def refuse_uneven_crop(model: nn.Module, config: Config) -> None:
    """The loss spreads the model's cells over the crop: a last cell that reaches beyond it would shift all masks."""
    stride: Any = model.stride
    if any(side % stride for side in config.data.crop):
        nearest = [max(stride, round(side / stride) * stride) for side in config.data.crop]
        raise UserError(
            f"data.crop = {config.data.crop} is no multiple of the model's stride of {stride} pixels",
            where="configuration",
            remedy=f"Take data.crop={nearest}.",
        )


def _bare(config: ModelConfig) -> ModelConfig:
    """Without the backbone's pretrained weights, which would be overwritten at once."""
    return replace(config, backbone=replace(config.backbone, weights="none"))


def _load_by_class(
    model: nn.Module, given: dict[str, Tensor], source: Path, config: Config, vocabulary: Vocabulary
) -> list[str]:
    """Load what is there, rows of the class head by class; what a person should know of it."""
    own, notes = model.state_dict(), []
    if (CLASS_ROWS in own) != (CLASS_ROWS in given):
        heads = ("a linear class head", "a class head by text embeddings (model.class_embeddings)")
        raise UserError(
            f"the checkpoint has {heads[CLASS_ROWS in given]}, the model {heads[CLASS_ROWS in own]}",
            where=str(source),
            remedy="Add --reinit-head, which takes all but its class head.",
        )
    if CLASS_ROWS in own:
        width, saved = own[CLASS_ROWS].shape[1], given[CLASS_ROWS].shape[1]
        if width != saved:
            raise UserError(
                f"the class embeddings are {width} wide, the checkpoint of train.init_from was trained with {saved}",
                where=str(source),
                remedy="Make them with the encoder of that run, or add --reinit-head, which takes all but its class "
                "head.",
            )
        given = {**given, CLASS_ROWS: own[CLASS_ROWS]}
    lent = lent_classes(config, source, vocabulary)
    if lent is not None:
        given, notes = lend_rows(own, given, lent, config.model.kind), [lent.note()]
    load_tensors(model, given, where=source)
    return notes


def _load_all_but_class_head(model: nn.Module, given: dict[str, Tensor], source: Path, kind: str) -> str:
    """Load what does not depend on the classes; a table of what starts anew. UserError where the rest does not fit."""
    own = model.state_dict()
    anew = [name for name in own if _is_of_classes(name, kind)]
    kept = {name: value for name, value in given.items() if not _is_of_classes(name, kind)}
    report = compare({name: value for name, value in own.items() if name not in anew}, kept)
    if not report.complete:
        raise UserError(
            f"the weights do not fit the model, even without the class head:\n{report.table()}\n",
            where=str(source),
            remedy="They come from another model configuration.",
        )
    model.load_state_dict(kept, strict=False)
    lines = [f"  anew       {name} {_shape(own[name])} ({_shape(given.get(name))} in {source})" for name in anew]
    return "\n".join([f"{report.matched} tensors taken from {source}, the class head starts anew:", *lines])


def _is_of_classes(name: str, kind: str) -> bool:
    return name.startswith(CLASS_HEADS[kind])


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))
