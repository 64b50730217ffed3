"""Files of pickled numpy arrays (.pkl), read without running anything in them.

A pickle is a program that names functions to call. This reader knows the few names that plain arrays need and puts
functions of its own in their place, so that not even numpy's run; any other name is refused before it is looked up.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mf_scale.errors import UserError

_KINDS = "biuf"
"""Of numpy's kinds of numbers: boolean, signed, unsigned, floating."""


def read_pickle(file: Path) -> Any:
    """Nested dictionaries, lists and plain values, with tensors in the place of arrays.

    Written by Python 2 or 3. UserError for a damaged file and for one that holds anything but those.
    """
    try:
        with file.open("rb") as stream:
            return _finished(_Reader(stream).load())
    except _ForeignError as error:
        raise UserError(
            f"the pickle holds more than arrays of numbers: {error}; nothing in it was run",
            where=str(file),
            remedy="Take a file from a source you trust to hold weights alone, best as .safetensors.",
        ) from error
    except OSError as error:
        raise UserError(f"the file cannot be read: {error}", where=str(file)) from error
    except Exception as error:  # a damaged or hostile pickle may fail in any of its instructions
        raise UserError(
            f"the pickle cannot be read: {type(error).__name__} {' '.join(str(error).split())[:200]}", where=str(file)
        ) from error


class _ForeignError(Exception):
    """Something the reader does not let in."""


class _Type:
    """Stands for numpy.dtype: remembers what was said, and is asked for numbers only."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])

    def numbers(self) -> np.dtype[Any]:
        code = self.code if self.code[:1] in "<>|=" else (self.order + self.code)
        kind = np.dtype(code) if code[1:2] in _KINDS and code[2:].isdigit() else None
        if kind is None or kind.kind not in _KINDS:
            raise _ForeignError(f"an array of type {self.code!r}")
        return kind


class _Array:
    """Stands for numpy.ndarray: its state becomes a tensor."""

    tensor: torch.Tensor

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, columns_first, content = state
        self.tensor = _tensor(content, kind, shape, "F" if columns_first else "C")


def _tensor(content: Any, kind: Any, shape: Any, order: str = "C") -> torch.Tensor:
    if not isinstance(kind, _Type) or not isinstance(content, bytes | bytearray | str):
        raise _ForeignError("an array that is not made of numbers")
    raw = content.encode("latin1") if isinstance(content, str) else bytes(content)  # Python 2 said bytes as text
    numbers = np.frombuffer(raw, kind.numbers())
    whole = numbers.reshape(tuple(shape), order="F" if order == "F" else "C")
    return torch.from_numpy(np.array(whole, dtype=whole.dtype.newbyteorder("="), order="C"))


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: Any, content: Any) -> torch.Tensor:
    return _tensor(content, kind, ())


def _no_bytes() -> bytes:
    """How a pickle of the older protocols says an empty bytes."""
    return b""


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _ForeignError(f"text in the encoding {encoding}")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
}
for _module in ("numpy.core", "numpy._core"):
    _NAMES[f"{_module}.multiarray", "_reconstruct"] = _empty_array
    _NAMES[f"{_module}.multiarray", "scalar"] = _scalar
    _NAMES[f"{_module}.numeric", "_frombuffer"] = _tensor


class _Reader(pickle.Unpickler):
    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _ForeignError(f"{module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _ForeignError("a reference to something outside the file")


def _finished(value: Any) -> Any:
    """The value with tensors in the place of what stood for arrays."""
    if isinstance(value, _Array):
        return value.tensor
    if isinstance(value, dict):
        return {key: _finished(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finished(inner) for inner in value]
    return value
