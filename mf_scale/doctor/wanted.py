"""What the doctor is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from mf_scale.config.schema import Config
from mf_scale.errors import UserError


@dataclass(frozen=True)
class Wanted:
    """What is to be examined, and how it is told."""

    file: str
    """Of the configuration; empty: the machine alone."""
    overrides: tuple[str, ...]
    config: Config | None
    broken: UserError | None
    """Rules of the configuration that are broken."""
    ranks: int | None
    """That the job will have; None: as many as there are now."""
    seconds: float
    """Limit of the whole examination."""
    began: float
    """When the command did, on the monotonic clock: imports from a cold file system count."""
    in_job: bool
    as_json: bool
    verbose: bool
