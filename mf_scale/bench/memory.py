"""Peak memory of a piece of work, over what was there before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_MMAP_THRESHOLD = -3  # mallopt's name for it


def peak_over_inputs(work: Callable[[], object], device: torch.device) -> float:
    """MiB that `work` takes at its peak beyond what is held before; on a CPU by the kernel's high-water mark (Linux).

    NaN where the system keeps no such mark.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not _give_back_freed_memory():
        return float("nan")
    before_kib = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    except OSError:
        return float("nan")
    work()
    return max(0.0, (_status("VmHWM") - before_kib) / 1024)


def _give_back_freed_memory() -> bool:
    """Freed memory that the allocator keeps would be taken again unseen: big blocks go to the system at once."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, 64 * 1024)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def _status(name: str) -> int:
    """A field of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0
