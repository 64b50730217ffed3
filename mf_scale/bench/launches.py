"""How often a piece of work starts a kernel on a GPU, and how often it waits for one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_NO_KERNEL = ("memcpy", "memset", "profilerstep")


def count_launches(work: Callable[[], object]) -> int:
    """Kernels that `work` runs on the GPU, by torch's profiler; copies and fills of memory are not kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as record:  # else it warns
        work()
        torch.cuda.synchronize()
    return kernels(record.events() or ())


def kernels(events: Iterable[Any]) -> int:
    """How many of a profile's events are kernels."""
    on_device = (e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False))
    return sum(not event.name.lower().startswith(_NO_KERNEL) for event in on_device)


def count_syncs(work: Callable[[], object]) -> int:
    """Operations of `work` that make the host wait for the GPU, by torch's own warnings of them."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return syncs(caught)


def syncs(caught: Iterable[warnings.WarningMessage]) -> int:
    """How many warnings are of a synchronising operation."""
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
