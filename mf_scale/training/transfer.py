"""Batches to the device, one micro-batch ahead of the computation: the copy hides behind the step before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from mf_scale.data.batch import Batch
from mf_scale.data.collate import cut

_TENSORS = ("images", "segment_map", "labels", "segment_layer", "class_mask")


class Transfer:
    """Copies through pinned memory on a stream of its own; on a CPU there is nothing to copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[Batch, int, _Copy] | None = None

    def start(self, batch: Batch, size: int) -> None:
        """Begin to copy the first micro-batch of `batch`, so that it is there when `micro_batches` asks for it."""
        self._begun = (batch, size, self._copy(cut(batch, 0, size)))

    def micro_batches(self, batch: Batch, size: int) -> Iterator[Batch]:
        """Micro-batches of `size` samples on the device, in order; the last may be smaller.

        The next one's copy is begun before one is handed over. Whoever takes it works on the current stream.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] is batch and begun[1] == size:
            copy = begun[2]
        else:
            copy = self._copy(cut(batch, 0, size))
        for start in range(size, len(batch), size):
            following = self._copy(cut(batch, start, start + size))
            yield copy.arrived()
            copy = following
        yield copy.arrived()

    def _copy(self, part: Batch) -> _Copy:
        if self._stream is None:
            return _Copy(part, None, self._device)
        # Pinned memory comes from torch's cache, which gives it out anew only once the copy has been made.
        pinned = {name: tensor.pin_memory() for name, tensor in batch_tensors(part).items()}
        with torch.cuda.stream(self._stream):
            there: dict[str, Any] = {
                name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()
            }
            return _Copy(replace(part, **there), self._stream.record_event(), self._device)


class _Copy:
    """A micro-batch on its way."""

    def __init__(self, batch: Batch, done: torch.cuda.Event | None, device: torch.device) -> None:
        self._batch, self._done, self._device = batch, done, device

    def arrived(self) -> Batch:
        """The micro-batch, for the current stream, which waits for the copy; the host does not."""
        if self._done is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._done)
            for tensor in batch_tensors(self._batch).values():
                # Its memory belongs to the copying stream: it must not be given out again while this one reads it.
                tensor.record_stream(current)
        return self._batch


def batch_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """The tensors of a batch by name; those that it has."""
    return {name: tensor for name in _TENSORS if (tensor := getattr(batch, name)) is not None}
