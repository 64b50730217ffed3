"""torch.compile of the model that a run trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mf_scale.errors import UserError


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Let the model compile itself at its first call, for that call's shapes; names and weights stay as they are.

    Training and validation become one graph each, a further one for every other shape. Raises UserError where
    compiling does not work on `device`, which is found out by compiling one sum.
    """
    try:
        torch.compile(_one_more, dynamic=False)(torch.zeros(64, device=device))
    except Exception as error:  # the compilers fail in many ways; the reason is told
        reason = " ".join(str(error).split("\n\n")[0].split())[:300]
        raise UserError(
            f"torch.compile does not work here: {type(error).__name__} {reason}",
            where="model.compile",
            remedy="Install a C++ compiler (for example apt-get install g++) or name one in CXX; or train with "
            "model.compile=false.",
        ) from error
    model.compile(dynamic=False)


def _one_more(x: Tensor) -> Tensor:
    return x + 1
