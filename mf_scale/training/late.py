"""Values of the device, fetched without waiting: the copy starts now and is read a step later."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """A flat fp32 tensor on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values.clone()

    def read(self) -> list[float]:
        """The values; waits only where the device has not come that far."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._host.tolist()
        return values
