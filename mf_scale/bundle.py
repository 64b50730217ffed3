"""A bundle: a checkpoint folder outside a run, without optimizer. What `import` and `export` write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from mf_scale.config.load import config_to_yaml
from mf_scale.config.schema import Config
from mf_scale.errors import UserError
from mf_scale.rundir import (
    CONFIG,
    MANIFEST,
    STATE,
    VOCABULARY,
    WEIGHTS,
    disk_errors,
    file_digest,
    write_atomically,
)
from mf_scale.vocabulary import Vocabulary


def write_bundle(
    folder: Path, model_state: Mapping[str, Tensor], config: Config, vocabulary: Vocabulary, step: int
) -> None:
    """Write weights, configuration and vocabulary as a folder that evaluate, predict and train.init_from take.

    `model_state` is the model's state_dict; `step` how long it was trained. The folder appears whole or not at all.
    UserError where it is there already and not empty, and where the disk refuses.
    """
    with new_folder(folder) as place:
        save_tensors(model_state, place / WEIGHTS)
        texts = {
            CONFIG: config_to_yaml(config),
            VOCABULARY: json.dumps(vocabulary.to_dict(), indent=1, ensure_ascii=False),
            STATE: json.dumps({"step": step}, indent=1),
        }
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
        files = {name: _entry(place / name) for name in (WEIGHTS, *texts)}
        manifest = {"format": 1, "step": step, "files": files}
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
            _flush(place)
            place.rename(folder)  # takes the place of an empty folder too
            _flush(folder.parent)
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


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Tensors as safetensors, on the disk when this returns; a full disk is an OSError as elsewhere."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(plain, file, metadata)
    except SafetensorError as error:  # it wraps what the system said
        raise OSError(str(error)) from error


def _entry(file: Path) -> dict[str, int | str]:
    _flush(file)
    return {"size": file.stat().st_size, "sha256": file_digest(file)}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
