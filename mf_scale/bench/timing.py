"""How long a piece of work takes, waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds of `work`, what the device still has to do included, and what it gave."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, result
