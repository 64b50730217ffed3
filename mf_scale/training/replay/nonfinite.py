"""Where a value stops being finite: the first module of a forward pass, the operator of a backward pass."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BACKWARD = re.compile(r"Function '(\w+)' returned nan")
_OWN_LINE = re.compile(r'File "([^"]*)", line (\d+), in (\S+)')
_OUTSIDE = ("/torch/", "/timm/", "/nonfinite.py")


class FirstModule:
    """Which module's output was the first that is not finite, and whether what it was given was finite."""

    def __init__(self) -> None:
        self.found: str | None = None

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[FirstModule]:
        """Look at every output of every module of `model` inside the block. Waits for the device at each."""
        self.found = None
        handles = [
            module.register_forward_hook(self._hook(name, type(module).__name__), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, kind: str) -> Callable[..., None]:
        def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if self.found is not None or all_finite(output):
                return
            own = [n for n, p in module.named_parameters(recurse=False) if not all_finite(p)]
            cause = "its input was not finite" if not all_finite((given, named)) else "its input was finite"
            self.found = f"{name or 'the model'} ({kind}): " + (f"{', '.join(own)} of its own" if own else cause)

        return look


def all_finite(values: Any) -> bool:
    """Whether every floating-point tensor anywhere in `values` (containers, dataclasses) is finite."""
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(values))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point() and values.numel():
            yield values.detach()
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(values) and not isinstance(values, type):
        for field in dataclasses.fields(values):
            yield from _tensors(getattr(values, field.name))


def backward_with_anomaly_detection(loss: Callable[[], Tensor]) -> str | None:
    """Make the loss and go backward under torch's anomaly detection; the operator whose gradient was NaN, or None.

    With the operator comes the line of the forward pass that made it, where that is not inside a library. Infinite
    gradients are no anomaly to torch until they become NaN.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly():
                loss().backward()
        except RuntimeError as error:
            operator = _BACKWARD.search(str(error))
            if operator is None:
                raise
            return operator[1] + _made_at("".join(str(warning.message) for warning in said))
    return None


def _made_at(traceback: str) -> str:
    """The innermost line of the forward pass's traceback that is not a library's."""
    lines = [m for m in _OWN_LINE.finditer(traceback) if not any(part in m[1] for part in _OUTSIDE)]
    if not lines:
        return ""
    file, line, function = lines[-1].groups()
    return f", made in {function} ({'/'.join(file.split('/')[-3:])}, line {line})"
