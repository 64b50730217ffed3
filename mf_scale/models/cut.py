"""A segmentation model cut before its classifier: the same modules and weights, but it ends at its features."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.errors import UserError
from mf_scale.models.pixel_level import PixelBackbone
from mf_scale.models.trial import check_path, freeze_untrained, run, trial_mode

_NAMES_SHOWN = 12


class _Reached(Exception):  # noqa: N818 - it is an event, not an error
    """The features are there; nothing behind them is run."""

    def __init__(self, features: Any) -> None:
        super().__init__()
        self.features = features


class _Cut(nn.Module):
    """Stands where the classifier stood and ends the run with what came in.

    torch.export wants every module to return: there the classifier answers, and what follows from it is dead code.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.channels_last = isinstance(classifier, nn.Linear)
        self._classifier = (classifier,)  # no part of the model: neither saved nor trained
        self.reached: list[Any] = []

    def forward(self, *inputs: Any, **named: Any) -> Any:
        features = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
        if self.channels_last and features is not None and features.dim() == 4:
            features = features.permute(0, 3, 1, 2)
        if torch.compiler.is_exporting():
            self.reached.append(features)
            return self._classifier[0](*inputs, **named)
        raise _Reached(features)


class _Ear:
    """A forward hook that keeps the output until it is taken; an object, so that a deep copy of a model has its own."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.heard.append(output)

    def take(self) -> list[Any]:
        """What was heard last; kept no longer, else the activations of a step would live until the next."""
        last = self.heard[-1:]
        self.heard.clear()
        return last


class CutModel(PixelBackbone):
    """Images -> [features], or [features, memory], of a model up to its classifier.

    The modules on the way to the classifier are shallow copies, so that the given model stays whole; all parameters
    and all other modules are its own. What it does not need is frozen.
    """

    def __init__(
        self,
        net: nn.Module,
        features: str,
        memory: str | None,
        sizes: tuple[tuple[int, int], tuple[int, int]],
    ) -> None:
        """`features` is the path of the classifier, `memory` of a layer; `sizes` of two trial images. UserError."""
        super().__init__()
        check_path(net, features, "model.pixel_level.features")
        if memory is not None:
            check_path(net, memory, "model.pixel_level.memory")
        self.cut = _Cut(net.get_submodule(features))
        self.net = _replaced(net, features, self.cut)
        self.ear = _Ear()
        if memory is not None:
            self.net = _listened(self.net, memory, self.ear)
        self._measure(features, memory, sizes)
        with trial_mode(self, gradients=True):
            frozen = freeze_untrained(self.net, run(self, sizes[0], gradients=True))
        self.notes = [
            f"pixel level: the input of {features} [{self.channels[0]} channels, stride {self.stride}]"
            + (f", memory of {memory} [{self.channels[1]} channels]" if memory is not None else ""),
            *([f"frozen, for the features do not depend on them: {_listed(frozen)}"] if frozen else []),
        ]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B,3,H,W], normalised."""
        try:
            self.net(images)
        except _Reached as reached:
            return [reached.features, *self.ear.take()]
        if self.cut.reached:
            return [self.cut.reached.pop(), *self.ear.take()]
        raise UserError(
            "the model ends without running the layer that was named as its classifier",
            where="model.pixel_level.features",
            remedy="Name a layer that its forward calls as a module.",
        )

    def _measure(self, features: str, memory: str | None, sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
        """Channels of both maps and the stride of the features, the same for both sizes of image."""
        strides = set()
        for height, width in sizes:
            maps = run(self, (height, width))
            self.channels = [_channels(maps[0], f"the input of {features}", "model.pixel_level.features")]
            if memory is not None:
                heard = maps[1] if len(maps) > 1 else None
                self.channels.append(_channels(heard, f"the output of {memory}", "model.pixel_level.memory"))
            strides |= {height / maps[0].shape[2], width / maps[0].shape[3]}
        if len(strides) > 1 or min(strides) % 1:
            found = " and ".join(f"{stride:.4g}" for stride in sorted(strides))
            raise UserError(
                f"the features before {features} have no whole stride: image sides of {sizes} pixels give {found} "
                "pixels a cell",
                where="model.pixel_level.features",
                remedy="Take model.size_divisor as the model's own, or a layer whose input divides the image evenly.",
            )
        self.stride = int(strides.pop())


def _channels(value: Any, what: str, where: str) -> int:
    if isinstance(value, Tensor) and value.dim() == 4 and value.shape[0] == 2 and value.is_floating_point():
        return value.shape[1]
    found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    found = "not made before the classifier runs" if value is None else f"no map [B,c,h,w] but {found}"
    raise UserError(f"{what} is {found} (B is 2 in the trial)", where=where, remedy="Name a layer of the map's path.")


def _copied(net: nn.Module) -> nn.Module:
    """A module with the same parameters, buffers and children, whose list of children may be changed."""
    twin = copy.copy(net)
    twin._modules = net._modules.copy()
    return twin


def _replaced(net: nn.Module, path: str, by: nn.Module) -> nn.Module:
    """`net` with another module at `path`; the modules on the way are copied, the others shared."""
    name, _, rest = path.partition(".")
    twin = _copied(net)
    child = twin._modules[name]
    assert child is not None  # the path was checked
    twin._modules[name] = _replaced(child, rest, by) if rest else by
    return twin


def _listened(net: nn.Module, path: str, ear: _Ear) -> nn.Module:
    """`net` with a copy at `path` whose output `ear` hears."""
    ears = _copied(net.get_submodule(path))
    ears._forward_hooks = ears._forward_hooks.copy()
    ears.register_forward_hook(ear)
    return _replaced(net, path, ears)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
