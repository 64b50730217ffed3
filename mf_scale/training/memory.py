"""Memory of this process: what the device held at most, and what the host holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_GIB = 2.0**30


def take_device_peak(device: torch.device) -> float:
    """GiB that torch's tensors took on the GPU at most since the last call; 0 on a CPU. Does not wait for the GPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / _GIB
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def host_memory() -> float:
    """GiB of this process in the host's memory (resident set, its loader processes not counted); 0 where unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / _GIB
