"""What a run knows besides its weights and moments: where it stands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mf_scale.data.state import DataState
from mf_scale.fingerprint import library_versions
from mf_scale.rundir import RunDir


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
    skipped: list[int] = field(default_factory=list)
    """Steps without an update, as far back as the guard against dead steps looks."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last updates, where the guard against spikes is on."""
    rollbacks: list[dict[str, int]] = field(default_factory=list)
    """Times a spike took the run back: its `step`, the step it went back `to`, the global batches `skipped` there."""
    best: tuple[int, float] | None = None
    """Step and loss of the lowest validation loss so far."""
    evaluated: int = 0
    """The last step an evaluation was finished at."""

    def note_validation(self, loss: float) -> None:
        """A validation was finished at the present step; one that is not finite is never the best."""
        self.validated = self.step
        if math.isfinite(loss) and (self.best is None or loss < self.best[1]):
            self.best = (self.step, loss)

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "updates": self.updates,
            "samples": self.samples,
            "quarantined": self.quarantined,
            "validated": self.validated,
            "data": self.data.to_dict(),
            "skipped": list(self.skipped),
            "losses": list(self.losses),
            "rollbacks": list(self.rollbacks),
            "best": self.best,
            "evaluated": self.evaluated,
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
            skipped=[int(step) for step in data["skipped"]],
            losses=[float(loss) for loss in data["losses"]],
            rollbacks=[dict(rollback) for rollback in data["rollbacks"]],
            best=(int(data["best"][0]), float(data["best"][1])) if data["best"] else None,
            evaluated=int(data.get("evaluated", 0)),
        )


def surroundings(run: RunDir, *, world: int, stage: int, seed: int) -> dict[str, Any]:
    """What a checkpoint says of how it came about beside the state; nothing is computed from it."""
    wandb = run.wandb / "run-id"
    return {
        "seed": seed,
        "world": world,
        "zero_stage": stage,
        "versions": library_versions(),
        "wandb_id": wandb.read_text(encoding="utf-8").strip() if wandb.is_file() else None,
    }
