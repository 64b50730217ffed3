"""Trial runs of somebody else's segmentation model: where its classifier is, what a layer gives, what gets a gradient.

The model is in eval mode meanwhile and the random state stays untouched.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.errors import UserError

_CLASSIFIERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_SHOWN = 8
_WHERE = "model.pixel_level.features"


@dataclass(frozen=True)
class _Call:
    """One run of a convolution or linear layer."""

    path: str
    layer: nn.Module
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    node: Any
    """Its place in the graph of the trial run."""

    def __str__(self) -> str:
        return f"{self.path} ({type(self.layer).__name__} {list(self.inputs)} -> {list(self.outputs)})"


@contextmanager
def trial_mode(net: nn.Module, *, gradients: bool) -> Iterator[torch.device]:
    """Eval mode and a random state of its own for the duration; gives the model's device."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.set_grad_enabled(gradients):
            yield device
    finally:
        for module, mode in modes.items():
            module.training = mode


def run(net: nn.Module, size: tuple[int, int], *, gradients: bool = False) -> Any:
    """What the model says to two blank images [2,3,H,W]; UserError where it fails."""
    with trial_mode(net, gradients=gradients) as device:
        images = torch.zeros(2, 3, *size, device=device, requires_grad=gradients)
        try:
            return net(images)
        except UserError:
            raise
        except Exception as error:  # it is not our model; the reason is passed on
            raise UserError(
                f"the model failed in a trial run with images [2,3,{size[0]},{size[1]}]: {_first_line(error)}",
                where="model.pixel_level",
                remedy="It must take a batch [B,3,H,W] of any size that model.size_divisor divides.",
            ) from error


def find_classifier(net: nn.Module, size: tuple[int, int]) -> str:
    """Path of the one layer that makes the classes.

    That is the last convolution or linear layer on every way to the model's output with as many output channels as the
    output has. UserError with the candidates where there is none or several.
    """
    calls: list[_Call] = []

    def note(path: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # The node is kept at once: an activation in place would put its own there.
        calls.append(_Call(path, layer, tuple(inputs[0].shape), tuple(output.shape), output.grad_fn))

    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, path=path: note(path, layer, inputs, output))
        for path, layer in net.named_modules()
        if isinstance(layer, _CLASSIFIERS)
    ]
    try:
        said = run(net, size, gradients=True)
    finally:
        for hook in hooks:
            hook.remove()
    output = _map_of(said)
    if output is None:
        raise UserError(
            f"the model's output is no differentiable map [B,K,h,w] but {_described(said)}: no classifier can be found",
            where=_WHERE,
            remedy=f"Name it. {_candidates(calls)}",
        )
    makers = [call for call in calls if call.outputs[_channel_axis(call.layer)] == output.shape[1]]
    last = _first_met(output.grad_fn, makers)
    paths = {call.path for call in last}
    if len(paths) != 1:
        number = "no layer makes" if not paths else f"{len(paths)} layers together make"
        raise UserError(
            f"{number} the {output.shape[1]} channels of the model's output, so its classifier cannot be told",
            where=_WHERE,
            remedy=f"Name it. {_candidates(last or calls)}",
        )
    return paths.pop()


def check_path(net: nn.Module, path: str, where: str) -> None:
    """UserError with the nearest paths where the model has no such layer."""
    known = [name for name, _ in net.named_modules() if name]
    if path not in known:
        near = difflib.get_close_matches(path, known, n=5, cutoff=0.3) or known[-5:]
        raise UserError(f"the model has no layer {path!r}", where=where, remedy=f"Nearest paths: {', '.join(near)}.")


def freeze_untrained(net: nn.Module, outputs: Iterable[Tensor]) -> list[str]:
    """Freeze the parameters that `outputs`, made with gradients, do not depend on; their names.

    A ZeRO engine waits for a gradient of every parameter that wants one.
    """
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    sums = [output.sum() for output in outputs if output.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(trained)
    if sums and trained:
        gradients = torch.autograd.grad(sums, list(trained.values()), allow_unused=True)
    frozen = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    for name in frozen:
        trained[name].requires_grad_(False)
    return frozen


def _map_of(said: Any) -> Tensor | None:
    """The class map among the model's answers: a tensor, `out` or `logits`, or the first that could be one."""
    if isinstance(said, Tensor):
        return said if said.dim() == 4 and said.grad_fn is not None else None
    if isinstance(said, Mapping):
        said = [said[key] for key in ("out", "logits") if key in said] or list(said.values())
    maps = (_map_of(item) for item in said) if isinstance(said, list | tuple) else ()
    return next((found for found in maps if found is not None), None)


def _first_met(output: Any, calls: Sequence[_Call]) -> list[_Call]:
    """The calls that are met first on the ways back from the output."""
    by_node = {call.node: call for call in calls}
    met, seen, waiting = [], {output}, [output]
    while waiting:
        node = waiting.pop()
        if node in by_node:
            met.append(by_node[node])
            continue
        after = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(after)
        waiting += after
    return met


def _channel_axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _candidates(calls: Sequence[_Call]) -> str:
    listed = ", ".join(str(call) for call in calls[-_SHOWN:])
    return f"The last layers that were run: {listed}." if listed else "It ran no convolution and no linear layer."


def _described(said: Any) -> str:
    return f"a tensor {list(said.shape)}" if isinstance(said, Tensor) else f"a {type(said).__name__}"


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__} {text}".strip()
