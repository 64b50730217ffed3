"""What a run knows besides its weights and moments: where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mf_scale.data.state import DataState


@dataclass
class TrainState:
    """Counters of a run and the position of its data. Everything random is a function of these and the seed."""

    step: int
    """Global batches consumed."""
    updates: int
    """Steps whose optimizer step was applied; the schedule follows this one."""
    samples: int
    """Samples consumed."""
    quarantined: int
    """Samples that did not decode and were replaced."""
    validated: int
    """The last step a validation loss was finished at."""
    data: DataState
    """Segments of the data order."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "updates": self.updates,
            "samples": self.samples,
            "quarantined": self.quarantined,
            "validated": self.validated,
            "data": self.data.to_dict(),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TrainState:
        return TrainState(
            int(data["step"]),
            int(data["updates"]),
            int(data["samples"]),
            int(data["quarantined"]),
            int(data["validated"]),
            DataState.from_dict(data["data"]),
        )
