"""A model of the user's own: the function that the configuration names is imported and called."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from torch import nn

from mf_scale.config.consent import shown_call
from mf_scale.config.schema import PixelLevelConfig
from mf_scale.errors import UserError

_WHERE = "model.pixel_level.builder"


def build_own(config: PixelLevelConfig) -> nn.Module:
    """The torch model that `package.module:function` returns for the keyword arguments.

    This runs code that the configuration names: whoever calls it knows that the user asked for it. UserError for a
    module or function that is not there, and for a function that fails or returns something else.
    """
    assert config.builder is not None
    function = _function(config.builder)
    try:
        built = function(**config.kwargs)
    except Exception as error:  # somebody else's code fails in its own ways; the reason is passed on
        raise UserError(
            f"{shown_call(config)} failed: {_reason(error)}", where=_WHERE, remedy="See model.pixel_level.kwargs."
        ) from error
    if not isinstance(built, nn.Module):
        raise UserError(
            f"{shown_call(config)} returned a {type(built).__name__}, not a torch.nn.Module",
            where=_WHERE,
            remedy="Name a function that returns a model which takes images [B,3,H,W].",
        )
    return built


def _function(builder: str) -> Any:
    name, colon, path = builder.partition(":")
    if not (colon and name and path):
        raise UserError(f"{builder!r} is not package.module:function", where=_WHERE)
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # an import runs the module
        raise UserError(
            f"the module {name} cannot be imported: {_reason(error)}",
            where=_WHERE,
            remedy="Is it installed, or its folder named in PYTHONPATH?",
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            callables = [known for known in dir(found) if callable(getattr(found, known, None))]
            near = difflib.get_close_matches(part, callables, n=5, cutoff=0.4)
            raise UserError(
                f"{name} has no function {path!r}", where=_WHERE, remedy=f"Nearest names: {', '.join(near) or 'none'}."
            )
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{builder} is a {type(found).__name__}, not a function", where=_WHERE)
    return found


def _reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__} {text}".strip()
