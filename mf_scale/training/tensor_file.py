"""Tensors into a file of the safetensors format, hashed in the same pass. Reading is that library's own.

Its `save_file` says a full disk in an exception of its own, wants tensors where a snapshot has the file's bytes, and
leaves the digest to a second reading, which for a large checkpoint comes from the disk again. It takes as long.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

PIECE = 8 * 2**20
"""Bytes hashed and written at once; both let other threads run."""
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a file stand."""

    header: bytes
    """The file's beginning, its own length first."""
    places: dict[str, tuple[int, int]]
    """Name -> first byte and the byte after the last, counted from the header's end; in this order, without holes."""
    size: int
    """Bytes after the header."""


def lay_out(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Layout:
    """The layout of a file with these tensors: wide elements first, so that all are aligned; TypeError for a dtype
    that the format does not have."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        if tensor.dtype not in _TYPES:
            raise TypeError(f"{name} is {tensor.dtype}, which the safetensors format does not have")
        places[name] = (end, end + tensor.nbytes)
        end += tensor.nbytes
        described[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": list(places[name]),
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Layout(len(text).to_bytes(8, "little") + text, places, end)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The tensor's elements in order as uint8 [bytes]; a view where the tensor is contiguous."""
    # as_strided: a single element counts as contiguous with any stride, and such a one has no view as bytes.
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def write_file(
    file: Path, pieces: Iterable[memoryview], between: Callable[[], None] = lambda: None
) -> dict[str, int | str]:
    """Write and flush the pieces; {"size": bytes, "sha256": digest}. `between` is called after each part of PIECE
    bytes at most. Raises the system's own OSError, and leaves no file then."""
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("wb", buffering=0) as stream:
            for piece in pieces:
                for at in range(0, len(piece), PIECE):
                    part = piece[at : at + PIECE]
                    digest.update(part)
                    _write_all(stream, part)
                    size += len(part)
                    between()
            os.fsync(stream.fileno())
    except OSError:
        # At once: while a disk is full to the last byte, the metrics of the training cannot be written either.
        file.unlink(missing_ok=True)
        raise
    return {"size": size, "sha256": digest.hexdigest()}


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, int | str]:
    """Write tensors of any device as they are now; what `write_file` gives and raises."""
    return write_file(file, tensor_pieces(tensors, metadata or {}))


def tensor_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The bytes of a file with these tensors, which come to the host one by one."""
    layout = lay_out(tensors, metadata)
    yield memoryview(layout.header)
    for name in layout.places:
        yield flat_bytes(tensors[name].cpu()).numpy().data


def _write_all(stream: IO[bytes], part: memoryview) -> None:
    while part:
        part = part[stream.write(part) :]
