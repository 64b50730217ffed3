"""Weights from files into models: read without unpickling, compared name by name, nothing dropped silently."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.errors import UserError
from mf_scale.models.pickles import read_pickle

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pkl")
COUNTER = ".num_batches_tracked"
"""How the name ends of a batch norm's count of batches: nothing is computed from it, and a frozen one has none."""
_ROWS_SHOWN = 12


@dataclass(frozen=True)
class WeightsReport:
    """What a file's tensors and a model's have in common, and what not."""

    matched: int
    """Tensors of equal name and shape."""
    missing: tuple[str, ...] = ()
    """In the model, not in the file."""
    unexpected: tuple[str, ...] = ()
    """In the file, not in the model."""
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    """Name, shape in the file, shape in the model."""
    counters: int = 0
    """Batch norms' counters that only one of both has; that does no harm."""

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def table(self) -> str:
        """One line a tensor that is off, under a head line with the counts."""
        counts = f"{self.matched} tensors fit, {len(self.missing)} missing, "
        counts += f"{len(self.unexpected)} unexpected, {len(self.mismatched)} of another shape"
        if self.counters:
            counts += f" ({self.counters} counters of batch norms, which a frozen one does not keep, do not matter)"
        lines = _rows("missing", self.missing) + _rows("unexpected", self.unexpected)
        lines += _rows(
            "shape", [f"{name}: {list(file)} in the file, {list(own)} here" for name, file, own in self.mismatched]
        )
        return "\n".join([counts, *lines])


def _rows(kind: str, names: tuple[str, ...] | list[str]) -> list[str]:
    rows = [f"  {kind:<10} {name}" for name in names[:_ROWS_SHOWN]]
    return rows if len(names) <= _ROWS_SHOWN else [*rows, f"  {kind:<10} ... and {len(names) - _ROWS_SHOWN} more"]


def compare(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> WeightsReport:
    """Compare a model's tensors with a file's by name and shape; the counters of batch norms are no matter."""
    counters = {name for name in own.keys() ^ given.keys() if name.endswith(COUNTER)}
    common = [name for name in own if name in given]
    mismatched = [(n, tuple(given[n].shape), tuple(own[n].shape)) for n in common if given[n].shape != own[n].shape]
    return WeightsReport(
        matched=len(common) - len(mismatched),
        missing=tuple(n for n in own if n not in given and n not in counters),
        unexpected=tuple(n for n in given if n not in own and n not in counters),
        mismatched=tuple(mismatched),
        counters=len(counters),
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors, .pth/.pt/.bin or .pkl (pickled arrays) file, on the CPU.

    Torch files are read with weights_only=True and pickles by `pickles`, so no code in them runs; a state dict under
    "state_dict" or "model" is found. UserError for a missing, damaged or foreign file.
    """
    if not file.is_file():
        raise UserError("the weights file does not exist", where=str(file), remedy="Check the path.")
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"unknown kind of weights file {file.suffix!r}", where=str(file), remedy=f"Use {', '.join(SUFFIXES)}."
        )
    content = _READERS.get(file.suffix, _read_torch)(file)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            "the weights file holds no state dict",
            where=str(file),
            remedy="It must map names to tensors and nothing else.",
        )
    return {str(name): tensor for name, tensor in content.items()}


def _read_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights file cannot be read: {error}", where=str(file)) from error


def _read_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            "the weights file holds more than tensors, or is damaged; nothing in it was run",
            where=str(file),
            remedy="Save its state dict alone, best as .safetensors.",
        ) from error
    except Exception as error:  # torch's unpickler fails on damaged files in many ways; the reason is passed on
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the weights file cannot be read: {first}", where=str(file)) from error


_READERS = {".safetensors": _read_safetensors, ".pkl": read_pickle}


def load_weights(model: nn.Module, file: Path, *, strict: bool = True) -> WeightsReport:
    """Load a whole model's weights, buffers included, and report what did not fit.

    With `strict` anything missing, unexpected or of another shape is a UserError with the table, and the model is left
    as it was; without, what fits is loaded and the caller has the report to show.
    """
    return load_tensors(model, read_weights(file), where=file, strict=strict)


def load_tensors(model: nn.Module, given: Mapping[str, Tensor], *, where: Path, strict: bool = True) -> WeightsReport:
    """`load_weights` with tensors that were read already, from `where`."""
    own = model.state_dict()
    report = compare(own, given)
    if strict and not report.complete:
        raise UserError(
            f"the weights do not fit the model:\n{report.table()}\n",
            where=str(where),
            remedy="They come from another model configuration or another number of classes.",
        )
    shapes_off = {name for name, _, _ in report.mismatched}
    model.load_state_dict({n: t for n, t in given.items() if n in own and n not in shapes_off}, strict=False)
    return report
