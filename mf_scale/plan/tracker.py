"""How much memory live tensors take while torch runs, to the byte: every storage from its making to its end.

Works on fake tensors, which have sizes and lifetimes but no numbers, so what a step of any size would hold is known
without the memory for it. What a kernel takes and gives back inside itself is not seen; `workspace` adds what is known
of that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Workspace = Callable[[tuple[Any, ...], Any], int]
"""Arguments and result of an operator -> bytes that it takes for as long as it runs."""


class Tracker(TorchDispatchMode):
    """Counts the storages that are made inside its block."""

    def __init__(self, before: Iterable[Tensor], workspaces: Mapping[str, Workspace]) -> None:
        """Storages of the tensors `before` are not counted; `workspaces` by the operator's name, as aten::add."""
        super().__init__()
        self.live = self.peak = 0
        self._workspaces = workspaces
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in before}

    def workspace(self, size: int) -> None:
        """`size` bytes more are taken here for a moment."""
        self.peak = max(self.peak, self.live + size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        if (taken := self._workspaces.get(func._schema.name)) is not None:
            self.workspace(taken(args, out))
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
