"""What a checkpoint's files hold, copied into host memory while the training stands still for a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mf_scale.training.tensor_file import Layout, flat_bytes, lay_out, tensor_pieces

CHUNK = 128 * 2**20
"""Bytes of host memory allocated at once: torch rounds pinned memory up to a power of two, so that larger pieces could
waste nearly as much as they hold."""


@dataclass(frozen=True)
class FileContents:
    """What one file of a checkpoint holds, in live memory of any device."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class FileBytes:
    """One file of a checkpoint as the bytes to be written."""

    name: str
    pieces: Iterable[memoryview]


def live_files(contents: Iterable[FileContents]) -> list[FileBytes]:
    """The contents as they are when they are written: the training must not go on before."""
    return [FileBytes(c.name, tensor_pieces(c.tensors, c.metadata)) for c in contents]


class Snapshot:
    """Host memory of a checkpoint's files, used again at every save: pinned for tensors of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._files: dict[str, _HostFile] = {}

    def prepare(self, contents: Iterable[FileContents]) -> None:
        """Allocate and touch the memory now, so that the first save does not pay for it: 0.7 s a GB on a CPU."""
        for content in contents:
            for chunk in self._host_file(content).chunks:
                chunk.zero_()

    def take(self, contents: Iterable[FileContents]) -> list[FileBytes]:
        """Copy the contents; the bytes stay as they are until the next call."""
        files = []
        for content in contents:
            host = self._host_file(content)
            for name, (start, _) in host.layout.places.items():
                host.fill(start, flat_bytes(content.tensors[name]))
            pieces = [memoryview(host.layout.header), *(chunk.numpy().data for chunk in host.chunks)]
            files.append(FileBytes(content.name, pieces))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return files

    def _host_file(self, content: FileContents) -> _HostFile:
        layout = lay_out(content.tensors, content.metadata)
        kept = self._files.get(content.name)
        if kept is None or kept.layout.header != layout.header:
            self._files.pop(content.name, None)
            del kept  # its memory is free before the new one's is taken
            self._files[content.name] = _HostFile.allocate(layout, pinned=self._device.type == "cuda")
        return self._files[content.name]


@dataclass(frozen=True)
class _HostFile:
    """What stands behind the header of a file, in chunks of host memory that follow each other."""

    layout: Layout
    chunks: list[Tensor]

    @staticmethod
    def allocate(layout: Layout, *, pinned: bool) -> _HostFile:
        sizes = [min(CHUNK, layout.size - at) for at in range(0, layout.size, CHUNK)]
        return _HostFile(layout, [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes])

    def fill(self, start: int, values: Tensor) -> None:
        """Copy uint8 `values` to byte `start` and on, without waiting for a device they are on."""
        for target, low, high in self._places(start, values.numel()):
            if values.device.type == "cpu":
                # One memcpy. torch's copy_ shares it among its threads, which wait for one another at every tensor:
                # on two cores that others use as well 540 MB took 1.2 s instead of 0.15.
                target.numpy().data[:] = values[low:high].numpy().data
            else:
                target.copy_(values[low:high], non_blocking=True)

    def _places(self, start: int, length: int) -> Iterator[tuple[Tensor, int, int]]:
        done = 0
        while done < length:
            number, at = divmod(start + done, CHUNK)
            part = min(length - done, CHUNK - at)
            yield self.chunks[number][at : at + part], done, done + part
            done += part
