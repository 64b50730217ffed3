"""A bundle: a checkpoint folder outside a run, without optimizer. What `import` and `export` write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mf_scale.config.load import config_to_yaml
from mf_scale.config.schema import Config
from mf_scale.errors import UserError
from mf_scale.rundir import (
    CONFIG,
    FORMAT,
    MANIFEST,
    STATE,
    VOCABULARY,
    WEIGHTS,
    disk_errors,
    fsync_folder,
    write_atomically,
)
from mf_scale.training.tensor_file import write_file, write_tensors
from mf_scale.vocabulary import Vocabulary


def write_bundle(
    folder: Path, model_state: Mapping[str, Tensor], config: Config, vocabulary: Vocabulary, step: int
) -> None:
    """Write weights, configuration and vocabulary as a folder that evaluate, predict and train.init_from take.

    `model_state` is the model's state_dict; `step` how long it was trained. The folder appears whole or not at all.
    UserError where it is there already and not empty, and where the disk refuses.
    """
    # There is one set of weights in the folder, whichever it is: nothing is left to choose from.
    alone = replace(config, eval=replace(config.eval, weights="auto"))
    with new_folder(folder) as place:
        files = {WEIGHTS: write_tensors(place / WEIGHTS, model_state)}
        texts = {
            CONFIG: config_to_yaml(alone),
            VOCABULARY: json.dumps(vocabulary.to_dict(), indent=1, ensure_ascii=False),
            STATE: json.dumps({"step": step}, indent=1),
        }
        files |= {name: write_file(place / name, [memoryview(text.encode())]) for name, text in texts.items()}
        manifest = {"format": FORMAT, "step": step, "files": files}
        write_atomically(place / MANIFEST, json.dumps(manifest, indent=1))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into; it takes the name when all went well, else it is removed.

    UserError where `folder` is there and not empty, and for what the disk refuses inside.
    """
    refuse_used_folder(folder)
    place = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    try:
        with disk_errors(folder):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            yield place
            fsync_folder(place)
            place.rename(folder)  # takes the place of an empty folder too
            with suppress(OSError):  # it has its name: a failure from here on is none of the folder's
                fsync_folder(folder.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def refuse_used_folder(folder: Path) -> None:
    """UserError where `folder` could not be written because something is there."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            "the folder is not empty, nothing is overwritten", where=str(folder), remedy="Choose a new folder."
        )
    if folder.exists() and not folder.is_dir():
        raise UserError("this is a file, not a folder", where=str(folder), remedy="Choose a new folder.")
