"""Every place where the host waits for the GPU, with the lines of Python that led there."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

_CALLS: tuple[tuple[Any, str], ...] = (
    (torch.cuda, "synchronize"),
    (torch.cuda.Event, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
)
"""Waits that a program asks for itself, of which torch's sync debug mode says nothing."""
_DEPTH = 12
_SELF = Path(__file__).name


@contextmanager
def recorded() -> Iterator[list[list[str]]]:
    """Stacks of the waits inside the block, innermost line first. An event that has come already is no wait."""
    found: list[list[str]] = []

    def show(message: Any, *_: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            found.append(_stack())

    with ExitStack() as stack:
        for owner, name in _CALLS:
            stack.enter_context(patch.object(owner, name, _noting(getattr(owner, name), found)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        stack.enter_context(patch.object(warnings, "showwarning", show))
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _noting(original: Callable[..., Any], found: list[list[str]]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if not (arguments and isinstance(arguments[0], torch.cuda.Event) and arguments[0].query()):
            found.append(_stack())
        return original(*arguments)

    return call


def _stack() -> list[str]:
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).name not in (_SELF, "warnings.py")]
    return [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.line}" for f in reversed(frames[-_DEPTH:])]
