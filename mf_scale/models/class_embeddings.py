"""Class embeddings: a [K,D] matrix from a file, one row a class, made by any encoder of text.

A .safetensors file holds one matrix, whatever its name, and may say in its metadata what its rows are: `vocabulary`
(the JSON of a vocabulary file) or `names` (a JSON list). A .npy file holds the matrix alone: its rows are then in the
order of the vocabulary at hand. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

VOCABULARY, NAMES = "vocabulary", "names"
"""Keys of a safetensors file's metadata."""
_SHOWN = 5
_FLOATS = ("float16", "float32")
_UNREADABLE = (ValueError, OSError, TypeError, EOFError, KeyError, SyntaxError, OverflowError, TokenError)
"""What numpy raises for a header that it cannot make sense of."""


@dataclass(frozen=True)
class ClassEmbeddings:
    """What a file says, checked."""

    rows: Tensor
    """[K,D] in fp32, each of length 1."""
    vocabulary: Vocabulary | None
    """Of the rows, where the file has a whole one."""
    names: tuple[str, ...] | None
    """Of the rows, where the file says them."""
    where: str


def read_class_embeddings(path: str) -> ClassEmbeddings:
    """Read a file of class embeddings; UserError for one that is missing, damaged, not finite, or has empty rows."""
    file = Path(path)
    if not file.is_file():
        raise UserError("the file of class embeddings does not exist", where=path, remedy="Check the path.")
    readers = {".safetensors": _read_safetensors, ".npy": _read_npy}
    if file.suffix not in readers:
        raise UserError(
            f"class embeddings are not read from {file.suffix or 'a file without an ending'}",
            where=path,
            remedy="Save the matrix [K,D] as .safetensors, or with numpy.save as .npy.",
        )
    matrix, metadata = readers[file.suffix](file)
    if matrix.ndim != 2 or 0 in matrix.shape or str(matrix.dtype).removeprefix("torch.") not in _FLOATS:
        raise UserError(
            f"the class embeddings are {list(matrix.shape)} of {str(matrix.dtype).removeprefix('torch.')}",
            where=path,
            remedy="They must be a matrix [K,D] in float16 or float32, one row a class.",
        )
    vocabulary = _vocabulary(metadata, path)
    names = tuple(vocabulary.names) if vocabulary is not None else _names(metadata, path)
    if names is not None and len(names) != len(matrix):
        raise UserError(f"{len(matrix):,} rows of class embeddings have {len(names):,} names", where=path)
    rows = matrix.double()
    _refuse_unusable(rows, names, path)
    # Not by `normalize`, which takes rows shorter than 1e-12 for zero.
    return ClassEmbeddings((rows / rows.norm(dim=1, keepdim=True)).float(), vocabulary, names, path)


def rows_for(embeddings: ClassEmbeddings, vocabulary: Vocabulary) -> Tensor:
    """The rows [K,D] in the order of `vocabulary`: by name where the file has names, else as they stand.

    UserError where a class has no row, and where a matrix without names has another number of rows. Rows of classes
    that the vocabulary does not have are left out.
    """
    rows, names, count = embeddings.rows, embeddings.names, len(vocabulary)
    if names is None:
        if len(rows) != count:
            raise UserError(
                f"the class embeddings have {len(rows):,} rows, vocabulary {vocabulary.name!r} has {count:,} classes",
                where=embeddings.where,
                remedy="One row a class, in the order of the vocabulary; or say the rows' names in the metadata of a "
                '.safetensors file ("names": a JSON list).',
            )
        return rows
    place = {name: row for row, name in enumerate(names)}
    missing = [name for name in vocabulary.names if name not in place]
    if missing:
        raise UserError(
            f"{len(missing):,} of {count:,} classes of vocabulary {vocabulary.name!r} have no class embedding: "
            f"{_listed(missing)}",
            where=embeddings.where,
            remedy=f"Names are matched exactly. The file has {len(names):,}: {_listed(names)}.",
        )
    return rows[[place[name] for name in vocabulary.names]]


def class_rows(path: str | None, vocabulary: Vocabulary) -> Tensor | None:
    """Rows [K,D] of model.class_embeddings for `vocabulary`; None where the model has a head of its own."""
    return None if path is None else rows_for(read_class_embeddings(path), vocabulary)


def exchanged_rows(path: str, vocabulary: Vocabulary, saved: Tensor | None) -> tuple[Vocabulary, Tensor]:
    """The vocabulary of a file and its rows [K,D], for a model trained with rows `saved` of `vocabulary`.

    A file with names alone takes thing or stuff from the classes of that name in `vocabulary`, and one without names is
    of `vocabulary` itself. UserError where something is missing, or the rows are not of the encoder's width.
    """
    if saved is None:
        raise UserError(
            "the checkpoint has a linear class head: its classes cannot be exchanged",
            where="model.class_embeddings",
            remedy="Train with model.class_embeddings, or leave it out.",
        )
    given = read_class_embeddings(path)
    if given.rows.shape[1] != saved.shape[1]:
        raise UserError(
            f"the class embeddings are {given.rows.shape[1]} wide, the model was trained with {saved.shape[1]}",
            where=path,
            remedy="Make them with the encoder that the model was trained with.",
        )
    if given.vocabulary is not None:
        return given.vocabulary, given.rows
    if given.names is not None:
        vocabulary = _named(given.names, vocabulary, path)
    return vocabulary, rows_for(given, vocabulary)


def _named(names: Sequence[str], vocabulary: Vocabulary, where: str) -> Vocabulary:
    infos = {info.name: info for info in vocabulary.classes}
    unknown = [name for name in names if name not in infos]
    if unknown:
        raise UserError(
            f"{len(unknown):,} of {len(names):,} class embeddings are of classes that vocabulary {vocabulary.name!r} "
            f"does not have, and nothing says whether they are things or stuff: {_listed(unknown)}",
            where=where,
            remedy='Write a whole vocabulary into the metadata ("vocabulary": the JSON of a vocabulary file), as '
            "mf_scale.models.class_embeddings.write_class_embeddings does.",
        )
    return Vocabulary(vocabulary.name, tuple(infos[name] for name in names))


def embedding_width(path: str) -> int:
    """D of a file; raises as `read_class_embeddings`."""
    with torch.device("cpu"):  # a model is also built on the meta device, where nothing has numbers
        return read_class_embeddings(path).rows.shape[1]


def write_class_embeddings(path: str | Path, matrix: Tensor | np.ndarray, vocabulary: Vocabulary) -> None:
    """Write a file that `read_class_embeddings` takes: `matrix` [K,D], its rows in the order of `vocabulary`."""
    from safetensors.torch import save_file

    rows = torch.as_tensor(np.asarray(matrix))
    rows = rows if rows.dtype in (torch.float16, torch.float32) else rows.float()
    save_file({"class_embeddings": rows.contiguous()}, path, metadata={VOCABULARY: json.dumps(vocabulary.to_dict())})


def _read_safetensors(file: Path) -> tuple[Tensor, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            if len(keys) == 1:
                return opened.get_tensor(keys[0]), opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"the file of class embeddings cannot be read: {error}", where=str(file)) from error
    raise UserError(
        f"the file holds {len(keys)} tensors, and which are the class embeddings is not known",
        where=str(file),
        remedy="Save the matrix [K,D] alone.",
    )


def _read_npy(file: Path) -> tuple[Tensor, dict[str, str]]:
    try:
        # Mapped: a header may tell of more than the file holds, for which memory would be taken before it is read.
        # Nor does a map open archives and objects, as numpy's `load` would.
        mapped = np.lib.format.open_memmap(file, mode="r")
        return torch.from_numpy(np.array(mapped, order="C")), {}
    except _UNREADABLE as error:
        raise UserError(
            f"the file of class embeddings cannot be read: {error}",
            where=str(file),
            remedy="It must hold one array of float16 or float32.",
        ) from error


def _vocabulary(metadata: dict[str, str], where: str) -> Vocabulary | None:
    return Vocabulary.from_dict(_parsed(metadata, VOCABULARY, where), where=where) if VOCABULARY in metadata else None


def _names(metadata: dict[str, str], where: str) -> tuple[str, ...] | None:
    if NAMES not in metadata:
        return None
    names = _parsed(metadata, NAMES, where)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError('"names" of the class embeddings is not a JSON list of names', where=where)
    doubles = [name for name, times in Counter(names).items() if times > 1]
    if doubles:
        raise UserError(f"class embeddings have a name several times: {_listed(doubles)}", where=where)
    return tuple(names)


def _parsed(metadata: dict[str, str], key: str, where: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise UserError(f'"{key}" in the metadata of the class embeddings is not JSON: {error}', where=where) from error


def _refuse_unusable(rows: Tensor, names: Sequence[str] | None, where: str) -> None:
    finite = rows.isfinite().all(dim=1)
    for what, unusable in (
        ("are not finite", ~finite),
        ("are zero, and have no direction", finite & (rows == 0).all(1)),
    ):
        if unusable.any():
            places = unusable.nonzero().flatten().tolist()
            shown = [f"row {place}" + (f" ({names[place]!r})" if names else "") for place in places[:_SHOWN]]
            more = f" and {len(places) - _SHOWN:,} more" if len(places) > _SHOWN else ""
            raise UserError(
                f"{len(places):,} of {len(rows):,} class embeddings {what}: {', '.join(shown)}{more}",
                where=where,
                remedy="Make them anew; a cosine needs a direction of every class.",
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN:,} more"
